"""reset="rotate" against reset="prefill": what the shortcut does to the distributions and answers.

The right answers are given token by token to all of them at once, and after each token the
distributions of the next one are compared: rotate with prefill, and for the size of the noise
prefill in bf16 with prefill in fp32. The first chunk has no boundary behind it and does not count.
Then each decodes freely.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from delethink.stepper import Stepper
from delethink.walks import Walks
from kvcomp import Delethink
from ops.common import DTYPES

AFTER = (1, 8, 64)  # tokens after a boundary


@dataclass(frozen=True)
class RotateRow:
    """KL divergences KL(reference || other) in nats."""

    part: str
    reference: str
    other: str
    chunk: int
    carry: int
    boundaries: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    kl_after: dict[int, float]  # tokens after a boundary -> mean
    kl_by_chunk: list[float]  # mean, of the second chunk and all later ones
    same_choice: float  # share of tokens for which both choose the same
    foreseen: tuple[float, float]  # share of right tokens that reference and other foresee
    step_accuracy: tuple[float, float]  # decoding freely
    answers_right: tuple[float, float]
    boundary_ms: tuple[float, float]  # median

    def line(self) -> str:
        after = ", ".join(f"{k}: {v:.1e}" for k, v in self.kl_after.items())

        def both(values: tuple[float, float]) -> str:
            return " / ".join(f"{v:.1%}" for v in values)

        return (
            f"{self.reference:13} | {self.other:13} carry {self.carry} of {self.chunk}"
            f"  KL {self.kl_mean:.1e} (p99 {self.kl_p99:.1e}, max {self.kl_max:.1e};"
            f" after {after})  same choice {self.same_choice:.2%}"
            f"  foreseen {both(self.foreseen)}  free: steps {both(self.step_accuracy)},"
            f" answers {both(self.answers_right)}"
            f"  boundary {self.boundary_ms[0]:.1f} / {self.boundary_ms[1]:.1f} ms"
        )


RESETS, PRECISIONS = ("prefill", "rotate"), ("fp32", "bf16")
PAIRS = (
    ("prefill fp32", "rotate fp32"),
    ("prefill bf16", "rotate bf16"),
    ("prefill fp32", "prefill bf16"),
)


def bench_rotate(options: argparse.Namespace) -> Iterator[RotateRow]:
    chunk, boundaries = options.rotate_chunk, options.rotate_boundaries
    carries = (chunk // 2, chunk * 3 // 4)
    most = chunk + boundaries * (chunk - carries[0])
    nodes, problems = options.nodes[0], options.rotate_problems
    walks = {d: Walks(nodes, problems, most, DTYPES[d]) for d in PRECISIONS}
    for carry in carries:
        tokens = chunk + boundaries * (chunk - carry)

        def steppers(carry: int = carry) -> dict[str, Stepper]:
            return {
                f"{reset} {d}": walks[d].stepper(
                    Delethink(chunk, carry, None, head=carry // 8, reset=reset)
                )
                for d in PRECISIONS
                for reset in RESETS
            }

        forced, free = steppers(), steppers()
        kls, same, foreseen = compare(forced, walks["fp32"].gold[:, :tokens], chunk)
        right = {}
        for name, stepper in free.items():
            stepper.decode(tokens)
            right[name] = walks["fp32"].right(stepper.ids())
        for stepper in (*forced.values(), *free.values()):
            stepper.close()
        for pair in PAIRS:
            kl = kls[pair]
            by_chunk = kl.unflatten(1, (-1, chunk - carry))  # [B, chunks, tokens of one]
            yield RotateRow(
                "rotate",
                *pair,
                chunk,
                carry,
                boundaries,
                kl.mean().item(),
                kl.flatten().quantile(0.99).item(),
                kl.max().item(),
                {n: by_chunk[:, :, n - 1].mean().item() for n in AFTER if n <= chunk - carry},
                by_chunk.mean((0, 2)).tolist(),
                share(same[pair]),
                tuple(share(foreseen[name]) for name in pair),
                tuple(share(right[name]) for name in pair),
                tuple(share(right[name].all(1)) for name in pair),
                tuple(boundary_ms(forced[name], free[name]) for name in pair),
            )


def compare(
    steppers: dict[str, Stepper], gold: Tensor, chunk: int
) -> tuple[dict[tuple, Tensor], dict[tuple, Tensor], dict[str, Tensor]]:
    """Feed all of them the right answers [B, tokens].

    Returns:
        by pair, KL divergences and whether both choose the same; by stepper, whether it chooses the
        right token. All [B, tokens - chunk], of what follows the first chunk.
    """
    kls, same = ({pair: [] for pair in PAIRS} for _ in range(2))
    foreseen = {name: [] for name in steppers}
    for column in range(gold.shape[1] - 1):
        for stepper in steppers.values():
            stepper.step(gold[:, column, None])
        if column + 1 < chunk:
            continue
        for name, stepper in steppers.items():
            foreseen[name].append(stepper.output[-1][:, 0] == gold[:, column + 1])
        for pair in PAIRS:
            first, second = (steppers[name].logits for name in pair)
            kls[pair].append(divergence(first, second))
            same[pair].append(first.argmax(-1) == second.argmax(-1))
    return tuple({k: torch.stack(v, 1) for k, v in x.items()} for x in (kls, same, foreseen))


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """[B] KL(reference || other) of logits [B, V], in float64."""
    p, q = (x.double().log_softmax(-1) for x in (reference, other))
    return (p.exp() * (p - q)).sum(-1)


def share(marks: Tensor) -> float:
    return marks.float().mean().item()


def boundary_ms(*steppers: Stepper) -> float:
    return 1e3 * statistics.median(s for p in steppers for s in p.run.meter.boundary_seconds)
