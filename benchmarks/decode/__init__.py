"""The parts of `bench_decode.py`."""
