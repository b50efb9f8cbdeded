"""The parts of `bench_delethink.py`."""
