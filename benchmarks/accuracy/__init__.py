"""The parts of `bench_accuracy.py`: problems, checkers, the settings of the papers, the study."""
