"""Parts of bench_engine."""
