"""The parts of `train_reasoner.py`."""
