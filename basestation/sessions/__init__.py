"""What the base station keeps of each session."""
