"""What the reasoner is taught, stage by stage: drills of recall, then walks, then one reader."""

from __future__ import annotations

from dataclasses import dataclass

from training.circuit import POINTER, RECALL_LAYERS


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum. Ranges are drawn from anew for each batch, ends included."""

    name: str
    steps: int  # optimiser steps at most
    tokens: int  # tokens in a batch, about
    nodes: tuple[int, int]
    walk: tuple[int, int]  # steps in the answer
    jump: tuple[float, float]  # share of steps, drawn per example, that jump to a random fact
    gap: int = 0  # longest gap in position ids
    lr: tuple[float, float] = (2e-3, 2e-3)  # at the start and at the end of the stage
    skip: float = 0.0  # share of batches in which one layer's attention writes nothing
    skippable: tuple[int, ...] = RECALL_LAYERS  # which layer: one of these, at random
    until: float = 2.0  # first-visit accuracy in training that ends the stage early


DRILL = (1.0, 1.0)
CURRICULUM = [
    Stage("drill, 4 nodes", 1000, 6400, (2, 4), (4, 8), DRILL, until=0.97),
    Stage("drill, 16 nodes", 600, 4000, (4, 16), (8, 32), DRILL, until=0.99),
    Stage("drill, 64 nodes", 600, 4000, (16, 64), (32, 64), DRILL, 512, until=0.99),
    Stage("walks", 400, 4000, (4, 56), (32, 96), (0.0, 1.0), 1024, (2e-3, 1e-3)),
    Stage("long walks", 300, 4000, (8, 64), (64, 192), (0.0, 0.5), 2048, (1e-3, 4e-4)),
    Stage("full length", 50, 4800, (12, 56), (480, 540), (0.0, 0.2), 64, (4e-4, 0.0)),
    Stage("two recall layers", 250, 4000, (8, 56), (48, 160), (0.0, 0.6), 2048, (1e-3, 0.0), 0.8),
    Stage("reader", 150, 4000, (8, 56), (48, 200), (0.0, 0.3), 2048, (6e-4, 0.0), 1.0, (POINTER,)),
]
SMOKE = [
    Stage("drill", 3, 512, (2, 4), (4, 8), DRILL),
    Stage("walks", 3, 512, (4, 8), (8, 16), (0.0, 1.0), 64, (1e-3, 0.0), 1.0, (POINTER,)),
]
