"""Cases of K and V in eight bits: made, and attended to in the shapes of the other cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvcomp.ops import OPS
from kvcomp.ops.quantize_rows import packed
from kvcomp.selftest.attention_cases import attention_cases
from kvcomp.selftest.case import HALF_AND_FULL, Case, generator_for, kv_cache, on
from kvcomp.selftest.retrieval_cases import retrieval_cases

CODED = {  # op -> the cases of it that are taken with codes, too
    "decode_attention": (
        "one-token",
        "odd-ragged",
        "empty-row",
        "group7-token-major",
        "slab",
        "dim96",
        "dim256",
        "long-row",
        "logits",
        "tokens-per-head",
        "tokens-shared",
        "pages16-per-head",
        "pages32-holes",
        "pages64-logits",
    ),
    "append_attention": ("odd-ragged", "tree", "ragged-queries", "most", "over-spans", "wide"),
    "attend_and_select": ("one-page", "splits", "tokens", "table"),
}


def _coded(case: Case) -> Case:
    def make(dtype, device):
        q, k, v, *rest = case.make(dtype, "cpu")
        return on(device, q, *(coded := codes_of(k, v))[:2], *rest, coded[2])

    return replace(case, name=f"{case.name}-codes", make=make, slack=_of_weights)


def _of_weights(impl: str, args: Sequence) -> float:
    """Error of an output when weights are rounded to int16: 2^-13 of the largest |value|.

    Only the CPU kernels round them, in tiles of 64 tokens. A weight errs by at most half a step,
    2^-16 of the largest in its tile, so a tile's output errs by at most 64 * 2^-16 of its largest
    probability times the largest value. The errors have either sign and do not follow the values,
    so we expect, and allow, sqrt(64) of them rather than 64. The largest probabilities of all tiles
    add up to at most 1, so many tiles err no more than one. For comparison, rounding to codes errs
    by up to 2^-8 of the largest value.
    """
    if impl != "cpu":
        return 0.0
    codes, words = args[2], args[-1]
    scales = words.contiguous().view(torch.float16).unflatten(-1, (-1, 2))[..., 1].float()
    return 8 * 2**-16 * (codes.float() * scales[..., None]).nan_to_num().abs().max().item()


def codes_of(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in the layout of k and v [B, Hkv, T, D], and words."""
    k_codes = torch.empty_strided(k.shape, k.stride(), dtype=torch.int8)
    v_codes = torch.empty_strided(v.shape, v.stride(), dtype=torch.int8)
    words = torch.empty(k.shape[:3], dtype=torch.int32)
    OPS["quantize_rows"].reference(k, v, k_codes, v_codes, words, False)
    return k_codes, v_codes, words


def _special(k: Tensor) -> None:
    """Rows of zeros, NaN, infinities, and numbers whose scales are subnormal, 0 or too large."""
    k[0, 0, 0] = 0
    k[0, 0, 1, 3], k[0, 0, 2, 5] = torch.nan, -torch.inf
    k[0, 0, 3] *= 1e-6
    k[0, 0, 4] *= 1e-4
    k[0, 0, 5] *= torch.finfo(k.dtype).max / k[0, 0, 5].abs().max() / 2


def _quantize_rows_cases() -> list[Case]:
    def build(name, batch, heads, slots, dim, layout="head", turn=False, special=False):
        def make(dtype, device):
            k, v = (
                kv_cache((batch, heads, slots, dim), dtype, generator_for(name, i), layout)
                for i in range(2)
            )
            if special:
                _special(k)
                _special(v.flip(2))
            codes = [torch.empty_strided(x.shape, x.stride(), dtype=torch.int8) for x in (k, v)]
            words = torch.empty(batch, heads, slots + 2, dtype=torch.int32)[..., :slots]
            return on(device, k, v, *codes, words, turn)

        return Case("quantize_rows", name, make, HALF_AND_FULL, (2, 3, 4))

    return [
        build("one-row", 1, 1, 1, 16),
        build("special", 2, 3, 70, 80, special=True),
        build("turned", 2, 2, 67, 128, "slab", turn=True),
        build("turned-special", 1, 2, 9, 64, "token", turn=True, special=True),
        build("wide", 1, 1, 130, 512, "crooked", turn=True),
        build("none", 2, 2, 0, 64),
    ]


def _hadamard_cases() -> list[Case]:
    def build(name, *shape):
        def make(dtype, device):
            return on(device, (torch.randn(shape, generator=generator_for(name)) * 3).to(dtype))

        return Case("hadamard", name, make, HALF_AND_FULL)

    return [
        build("one-row", 16),
        build("queries", 2, 9, 128),
        build("several", 2, 3, 4, 64),
        build("wide", 70, 512),
        build("none", 0, 32),
    ]


def _pooled_cases() -> list[Case]:
    """What moves rows between slots and pool, with codes in both."""
    of = ("store_segments", "fetch_rows")

    def coded(case: Case) -> Case:
        def make(dtype, device):
            args = list(case.make(dtype, "cpu"))
            k, v, words = codes_of(args[0], args[1])
            args[:2] = k, v
            args[7] = [packed(*codes_of(*block.unbind(3))) for block in args[7]]
            turned = [k.shape[-1] & (k.shape[-1] - 1) == 0] * (case.op == "store_segments")
            return on(device, *args, words, *turned)

        mutates = (*case.mutates, 9) if case.op == "fetch_rows" else case.mutates
        return replace(case, name=f"{case.name}-codes", make=make, mutates=mutates)

    unlike = "unlike", "no-v"  # codes of K and V are as many
    cases = [x for x in retrieval_cases() if x.op in of and x.name not in unlike]
    return [coded(case) for case in cases if not case.blank]


def code_cases() -> list[Case]:
    coded = [_coded(x) for x in attention_cases() if x.name in CODED.get(x.op, ())]
    return [*coded, *_hadamard_cases(), *_pooled_cases(), *_quantize_rows_cases()]
