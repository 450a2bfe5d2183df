"""What the benchmarks share: processes, prompts, options, result files."""
