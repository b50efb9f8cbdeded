"""How long a chunk, how much of it is carried, how long a head: at one thinking budget."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from delethink.walks import Walks
from kvcomp import Delethink


@dataclass(frozen=True)
class SweepRow:
    part: str
    what: str  # is varied
    chunk: int
    carry: int
    head: int
    tokens: int  # thought
    boundaries: int
    step_accuracy: float
    answers_right: float
    attended: float  # tokens per step and layer
    attended_ratio: float  # of dense
    peak_bytes: int  # of K and V, all sequences
    reencoded: float  # tokens encoded anew, per token thought

    def line(self) -> str:
        return (
            f"{self.what:9} chunk {self.chunk:4}  carry {self.carry:4}  head {self.head:3}"
            f"  {self.boundaries:4} boundaries  steps {self.step_accuracy:6.1%}"
            f"  answers {self.answers_right:6.1%}  attended {self.attended:5.0f}"
            f" ({self.attended_ratio:.0%})  KV peak {self.peak_bytes / 2**20:5.1f} MiB"
            f"  encoded anew {self.reencoded:.2f} per token"
        )


def settings(options: argparse.Namespace) -> Iterator[tuple[str, int, int, int]]:
    """What is varied, chunk, carry and head. A step of a walk has four tokens."""
    if options.smoke:
        yield from [("chunk", 32, 16, 4), ("few", 32, 4, 0), ("few", 32, 1, 0)]
        return
    for chunk in (128, 256, 512, 1024):
        yield "chunk", chunk, chunk // 2, 16
    for eighths in range(1, 8):
        yield "carry", 512, 64 * eighths, 16
    for head in (0, 16, 100):
        yield "head", 256, 128, head
    for carry in (1, 2, 3, 4, 5, 6, 8, 12, 16):
        yield "few", 128, carry, 0
    for carry in (61, 62, 63, 65):
        yield "odd", 128, carry, 0


def bench_sweep(options: argparse.Namespace) -> Iterator[SweepRow]:
    walks = Walks(options.nodes[0], options.sweep_problems, options.sweep_tokens)
    for what, chunk, carry, head in settings(options):
        stepper = walks.stepper(Delethink(chunk=chunk, carry=carry, head=head, max_chunks=None))
        stepper.decode(options.sweep_tokens)
        stepper.close()
        right, report = walks.right(stepper.ids()), stepper.run.report()
        meter, rows = stepper.run.meter, len(right)
        yield SweepRow(
            "sweep",
            what,
            chunk,
            carry,
            head,
            options.sweep_tokens,
            len(meter.boundary_seconds),
            right.float().mean().item(),
            right.all(1).float().mean().item(),
            report.tokens_attended,
            report.attended_ratio,
            report.kv_bytes_peak,
            meter.reencoded_tokens / rows / options.sweep_tokens,
        )
