"""What a pair of a small and a large model gains: by category of prompt, and against other programs."""
