"""Shared by tests and benchmarks: cases per op, comparisons, tiny models, timing."""
