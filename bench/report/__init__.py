"""docs/results.md and its plots, from result files alone."""
