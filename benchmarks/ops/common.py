"""What the families share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor

from harness.contenders import Against, Contender, Expected, Settings, implementations
from kvcomp.ops import OPS
from kvcomp.ops.decode_attention import logits_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAGE = 16  # DELTA's default
# Logits of this spread put 90 % of the probability on 5 % of the tokens, as attention does:
# the share of the top 5 % of N(0, s^2) logits is Phi(s - 1.645).
PEAK = 2.93


def empty_logits(q: Tensor, tokens: int) -> Tensor:
    """Room for the logits of q [B, Hq, D], as caches have it."""
    return q.new_empty(*q.shape[:2], tokens, dtype=logits_dtype(q))


def random_logits(heads: int, tokens: int, device: str) -> Tensor:
    """[1, heads, tokens], as caches keep them beside K and V in bf16."""
    logits = empty_logits(torch.empty(1, heads, 1, dtype=torch.bfloat16, device=device), tokens)
    return logits.copy_(torch.randn(logits.shape, device=device) * PEAK)


def dtype_name(tensor: Tensor) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)


def plain_contenders(
    op: str,
    args: tuple,
    moved: int,
    baselines: dict,
    run: Settings,
    *,
    trust: tuple[str, ...] = (),
    written: tuple[int, ...] = (),
    results: Callable[[tuple, object], tuple] | None = None,
) -> list[Contender]:
    """Implementations and baselines of an op whose inputs are its schema's arguments.

    trust: baselines that do less than the op, so that there is nothing to compare.
    written: positions of the arguments that hold the result, of an op that changes its arguments.
    results: what to compare where that does not say it, from the arguments and what was returned.
    """
    if written:
        results = lambda x, _: tuple(x[i] for i in written)  # noqa: E731
    expected = expect(op, args, results)
    contenders = [
        Contender(
            name,
            call,
            moved,
            expected=None if name in trust else expected,
            ours=False,
            results=results,
        )
        for name, call in baselines.items()
    ]
    against = tuple(Against(name, name) for name in baselines)
    for name in implementations(op, run.device):
        contenders.append(
            Contender(
                name,
                calling(OPS[op].impls[name]),
                moved,
                expected=expected,
                against=against if name != "reference" else (),
                results=results,
            )
        )
    return contenders


def expect(op: str, args: tuple, results: Callable[[tuple, object], tuple] | None) -> Expected:
    """What the reference returns or, where there are `results`, what it leaves in its arguments."""
    reference = OPS[op].reference
    if results is None:
        return Expected(reference, args)

    def changed(*args: object) -> tuple[Tensor, ...]:
        args = deepcopy(args)
        return results(args, reference(*args))

    return Expected(changed, args, exact=True)


def calling(impl: Callable) -> Callable[[tuple], object]:
    return lambda x: impl(*x)


def in_order(k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    """The same tokens are the same, wherever they lie: by position [B, H, N]."""
    order = position.argsort(-1)
    index = order[..., None].expand_as(k)
    return k.gather(2, index), v.gather(2, index), position.gather(2, order)


def heads_of(text: str) -> tuple[int, int, int]:
    """Query heads, KV heads and head size of the command line's "32/8x128"."""
    match = re.fullmatch(r"(\d+)/(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected Hq/HkvxD, such as 32/8x128, got {text!r}")
    return tuple(map(int, match.groups()))
