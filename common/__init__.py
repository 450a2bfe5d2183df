"""Plumbing that both ends and the tools share: command line, key files, JSON-lines files, address checks."""
