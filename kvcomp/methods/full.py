"""Full: dense attention over everything, the baseline of all baselines.

Saves nothing and drops nothing. What it adds to stock decoding is the cache (appended in place,
no padding stored) and the kernel (each K and V row read once for its group of query heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomp.methods.base import Method


@dataclass(frozen=True)
class Full(Method, name="full", baseline=True):
    """Dense attention."""

    static: ClassVar[bool] = True
