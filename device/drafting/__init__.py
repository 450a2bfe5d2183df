"""Tokens are drafted: by the draft model or by prompt lookup."""
