"""How the benchmarks time, compare and record."""
