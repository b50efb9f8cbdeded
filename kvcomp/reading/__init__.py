"""Real text read under a method, token by token, and compared with dense attention.

The texts come with Python; the model is any causal LM of transformers.
"""

from kvcomp.reading.dense import Dense
from kvcomp.reading.read import read
from kvcomp.reading.sizes import as_it_comes, scaled
from kvcomp.reading.texts import TEXTS, Window, checksums, opening, windows

__all__ = [
    "TEXTS",
    "Dense",
    "Window",
    "as_it_comes",
    "checksums",
    "opening",
    "read",
    "scaled",
    "windows",
]
