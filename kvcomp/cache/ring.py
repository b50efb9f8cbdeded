"""Rings: the row in which a step writes its notes, until the host reads them and starts again."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvcomp._torch import keep_address


class Ring(Protocol):
    """The interface of a ring for methods."""

    @property
    def row(self) -> int | Tensor:
        """The row of the current step, from 0 to size - 1."""

    def advance(self) -> None:
        """Go to the row of the next step."""

    def restart(self) -> None:
        """Start again: the next step writes row 0."""


class HostRing:
    """A ring whose row the host counts."""

    def __init__(self, size: int) -> None:
        self.size, self.row = size, 0

    def advance(self) -> None:
        self.row = (self.row + 1) % self.size

    def restart(self) -> None:
        self.row = 0


class StaticRing:
    """A ring whose row is [1] int64 at a fixed address on the device, for steps in one graph."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.row = size, torch.zeros(1, dtype=torch.int64, device=device)
        keep_address(self.row)

    def advance(self) -> None:
        self.row.add_(1).remainder_(self.size)

    def restart(self) -> None:
        self.row.zero_()
