"""The parts of `bench_long_run.py`."""
