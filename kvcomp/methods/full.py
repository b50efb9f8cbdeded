"""Full: dense attention over all tokens, the baseline for every other method.

It saves nothing and drops nothing. Compared with stock decoding it has kvcomp's cache, which
appends in place and stores no padding, and its kernel, which reads each K and V row once for its
group of query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomp.methods.base import Method


@dataclass(frozen=True)
class Full(Method, name="full", baseline=True):
    """Dense attention."""

    static: ClassVar[bool] = True
