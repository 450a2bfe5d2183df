"""Rounds of one session: Drafts sent, Verdicts committed, losses mended."""
