"""How many tokens a round drafts, from what, and how many Drafts are in flight."""
