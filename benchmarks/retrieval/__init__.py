"""The parts of `bench_retrieval.py`."""
