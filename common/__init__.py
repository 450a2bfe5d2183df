"""Utilities that both ends and the tools share: command line, configuration, key files, JSON lines, loopback check."""
