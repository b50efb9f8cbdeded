"""Rings: where steps leave notes, row after row, until the host has read them and begins anew."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvcomp._torch import keep_address


class Ring(Protocol):
    """What a method sees of it."""

    @property
    def row(self) -> int | Tensor:
        """The row of the running step: 0 at first, below the size."""

    def advance(self) -> None:
        """A step is over."""

    def restart(self) -> None:
        """The next step writes the first row."""


class HostRing:
    """The host knows the row."""

    def __init__(self, size: int) -> None:
        self.size, self.row = size, 0

    def advance(self) -> None:
        self.row = (self.row + 1) % self.size

    def restart(self) -> None:
        self.row = 0


class StaticRing:
    """The row is [1] int64 on a device, at one address, so that steps of one graph count it up."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.row = size, torch.zeros(1, dtype=torch.int64, device=device)
        keep_address(self.row)

    def advance(self) -> None:
        self.row.add_(1).remainder_(self.size)

    def restart(self) -> None:
        self.row.zero_()
