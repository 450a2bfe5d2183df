"""Batches the rounds of all sessions into passes of the target."""
