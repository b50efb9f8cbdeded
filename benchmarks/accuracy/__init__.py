"""The study of bench_accuracy.py: sizes, cells, results, intervals, charts."""
