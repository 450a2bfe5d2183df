"""Utilities that both ends and the tools share: command line, option groups, configuration, key files, JSON lines, loopback check."""
