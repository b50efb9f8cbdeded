"""The families of `bench_ops.py`: what each op is timed on, compared with, and must return."""
