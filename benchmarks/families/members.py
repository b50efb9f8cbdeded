"""The members of the eviction and the retrieval family, all of the same size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvcomp
from kvcomp import Method


@dataclass(frozen=True)
class WithoutRecurs(kvcomp.LazyEviction):
    """The interval term alone."""

    def recurs(self, interval: Tensor) -> Tensor:
        return torch.zeros_like(interval)


def family(alpha: float, prompt: int) -> dict[str, Callable[[int, int], Method]]:
    """By name, from bound and window to a method; `prompt` tokens decide who can pin them."""

    def lazy(cls: type) -> Callable[[int, int], Method]:
        return lambda bound, window: cls(budget=bound - window, window=window, alpha=alpha)

    def plain(cls: type, **fields: Any) -> Callable[[int, int], Method]:
        return lambda bound, window: cls(budget=bound - window, window=window, **fields)

    table = {
        "lazy-eviction": lazy(kvcomp.LazyEviction),
        "lazy without H2": lazy(WithoutRecurs),
        "raas, no pin": plain(kvcomp.RaaS, alpha=alpha, keep_prompt=False),
        "h2o": plain(kvcomp.H2O),
        "h2o, recent=window": lambda bound, window: kvcomp.H2O(
            budget=bound - window, window=window, recent=window
        ),
        "tova": plain(kvcomp.TOVA),
        "snapkv": plain(kvcomp.SnapKV),
        "r-kv": plain(kvcomp.RKV),
        "lagkv": lambda bound, window: kvcomp.LagKV(
            budget=bound - window, window=window, partition=bound // 8
        ),
        "streaming-llm": plain(kvcomp.StreamingLLM),
        "lm-infinite": plain(kvcomp.LMInfinite),
        "recency-window": plain(kvcomp.RecencyWindow),
        "random-eviction": lambda bound, window: kvcomp.RandomEviction(
            budget=bound - window, window=window, recent=max(window, 16)
        ),
    }

    def pinned(bound: int, window: int) -> Method | None:
        return (
            None
            if bound - window <= prompt + 16
            else kvcomp.RandomEviction(
                budget=bound - window, window=window, recent=16, keep_prompt=True
            )
        )

    def raas(bound: int, window: int) -> Method | None:
        return (
            None
            if bound - window <= prompt + 1
            else kvcomp.RaaS(budget=bound - window, window=window, alpha=alpha)
        )

    return table | {"random, prompt pinned": pinned, "raas": raas}


# The similarity of successive queries of the reasoner is about 0 at every step: it takes a high tau
# to retrieve at every fact.
TAUS = (-0.2, 0.0, 0.1, 0.2, 0.3, 0.5)


def retrieval_family(bound: int) -> dict[str, Method]:
    """With at most `bound` tokens on the device, in all layers but the first."""
    shares = {"sinks": 4, "local": bound // 6, "dense_layers": 1}
    segment = (4, 16)
    budget = bound - shares["sinks"] - shares["local"] - segment[1] - 1
    shares["budget"] = budget
    clusters = {**shares, "segment": segment, "cluster_size": 4}
    table: dict[str, Method] = {
        f"louis-kv, tau {tau}": kvcomp.LouisKV(**clusters, tau=tau) for tau in TAUS
    }
    table["per-token-retrieval"] = kvcomp.PerTokenRetrieval(**clusters, tau=TAUS[-1])
    for stride in (2, 4):
        table[f"stride-retrieval, {stride}"] = kvcomp.StrideRetrieval(
            **{**clusters, "budget": budget + segment[1] - stride}, stride=stride
        )
    table["cluster-kv"] = kvcomp.ClusterKV(
        **shares, cluster_size=8, output_window=16, output_cluster=4
    )
    for page in (4, 16):
        pages = {**shares, "budget": budget + segment[1] - page, "page_size": page}
        table[f"quest, pages of {page}"] = kvcomp.Quest(**pages)
        table[f"arkvale, pages of {page}"] = kvcomp.ArkVale(**pages)
        table[f"free-kv, pages of {page}"] = kvcomp.FreeKV(**pages)
    tokens = {"budget": bound, "selecting": (2,)}
    table["tidal-decode"] = kvcomp.TidalDecode(**tokens)
    table["less-is-more"] = kvcomp.LessIsMore(**tokens, recent=bound // 4)
    table["recency-window"] = kvcomp.RecencyWindow(budget=bound - 16, window=16)
    return table
