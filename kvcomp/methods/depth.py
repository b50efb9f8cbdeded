"""How many first layers attend to everything, where the user does not say."""

from __future__ import annotations


def default_warmup(num_layers: int) -> int:
    """Of `num_layers` layers: 2, as in DELTA's paper, but at most a quarter of them.

    Where few layers attend to everything, nothing would be left that could leave something out.
    """
    return min(2, num_layers // 4)
