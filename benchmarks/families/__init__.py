"""The parts of bench_families.py."""
