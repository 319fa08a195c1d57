"""Benchmarks: correctness first, candidates in turn, ratios of one run."""
