"""Answers of the command line and of the HTTP service."""
