"""Baselines: methods to compare with, on the same hooks, cache and kernels."""
