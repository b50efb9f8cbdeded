"""The methods, one file each: import line here, and it is in METHODS."""

from kvcomp.methods.base import METHODS, Method
from kvcomp.methods.baselines.random_pages import RandomPages
from kvcomp.methods.delta import Delta
from kvcomp.methods.full import Full

__all__ = ["METHODS", "Delta", "Full", "Method", "RandomPages"]
