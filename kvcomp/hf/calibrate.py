"""Calibration: measures model-dependent fields, i.e. delta layers, alpha and window, or tau.

Each calibration reads answers with dense attention while a recorder, itself a method, observes. The
answers are given, or decoded greedily. What was found replaces the default only if it predicts the
answers better, by more than chance explains (`better`). Call it through `Method.calibrate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcomp.checks import require
from kvcomp.hf.decode import answer_losses, decode_all
from kvcomp.hf.recorders import IntervalRecorder, PageRecorder, SimilarityRecorder
from kvcomp.methods import Delta, LazyEviction, LouisKV, Method
from kvcomp.methods.louis_kv import CALIBRATED_RATE

M = TypeVar("M", bound=Method)

BLOCK = 64  # tokens of an answer whose mean loss counts as one observation
FEW = 8  # observations, below which their spread says nothing
ALPHAS = (1e-4, 1e-3, 1e-2, 5e-2, 0.1, 0.2, 0.4)  # the candidates


def calibrate(
    method: type[Method], model: PreTrainedModel, prompts: list, **options: Any
) -> Method:
    """Make a method with its model-dependent fields measured on `prompts`.

    Args:
        options: options of the calibrations below, and the other fields of the result.

    Raises:
        TypeError: the method has nothing to measure.
    """
    for kind, calibration in CALIBRATIONS.items():
        if issubclass(method, kind):
            return calibration(method, model, prompts, **options)
    known = ", ".join(kind.__name__ for kind in CALIBRATIONS)
    raise TypeError(
        f"kvcomp.{method.__name__}.calibrate: this method has no fields to measure; those of"
        f" {known} can be measured"
    )


def better(default: M, found: Sequence[M], losses: Callable[[Method], list[Tensor]]) -> M:
    """The best method of `found`, or `default` if it is not clearly worse.

    The answers are cut into blocks of 64 tokens. Even blocks choose among `found`; the odd ones,
    which had no say in it, must then confirm it: the mean gain of a block exceeds twice its
    standard error, or there are too few blocks for one and the gain is positive in both halves.

    Args:
        losses: the losses [tokens] of each answer under a method.
    """
    usual = torch.cat([_blocks(answer) for answer in losses(default)])
    gains = {
        method: usual - torch.cat([_blocks(answer) for answer in losses(method)])
        for method in found
    }
    best = max(gains, key=lambda method: gains[method][::2].mean().item())
    chosen, confirming = gains[best][::2], gains[best][1::2]
    error = confirming.std() / len(confirming) ** 0.5 if len(confirming) >= FEW else 0.0
    confirmed = not len(confirming) or confirming.mean() > 2 * error
    return best if confirmed and chosen.mean() > 0 else default


def _blocks(losses: Tensor) -> Tensor:
    """Means of the losses [tokens] over blocks, the last of which may be shorter."""
    means = [block.double().mean().item() for block in losses.split(BLOCK) if len(block)]
    return torch.tensor(means, dtype=torch.float64)


def _answers(
    model: PreTrainedModel,
    prompts: list,
    answers: Sequence[Any] | None,
    recorder: Method,
    tokenizer: Any,
    max_new_tokens: int,
) -> list[Tensor]:
    """The token ids of the answers, which are given or decoded, and which the recorder has seen."""
    reading = {"tokenizer": tokenizer}
    if answers is None:
        return decode_all(model, prompts, recorder, max_new_tokens=max_new_tokens, **reading)
    given = [
        torch.tensor(tokenizer(answer, add_special_tokens=False).input_ids)
        if isinstance(answer, str)
        else torch.as_tensor(answer)
        for answer in answers
    ]
    answer_losses(model, prompts, given, recorder, **reading)
    return given


def calibrate_delta(
    cls: type[Delta],
    model: PreTrainedModel,
    prompts: list,
    *,
    tokenizer: Any = None,
    answers: Sequence[Any] | None = None,
    num_delta: int = 3,
    max_new_tokens: int = 1024,
    every: int = 64,
    **fields: Any,
) -> Delta:
    """Find the delta layers of a model: the set that covers most of each layer's best pages.

    The model reads or writes every answer with dense attention. Every `every` steps the page
    scores of all layers are recorded. A dynamic programme then places `num_delta` delta layers, the
    first directly after the warm-up. It maximises the mean share of a layer's best-K page mass that
    the pages of its delta layer cover. That share does not always predict the loss, so the default
    layers stay unless the answers are predicted better (`better`); they do not compete if they are
    more than `num_delta`.

    Args:
        model: a Hugging Face causal LM.
        prompts: texts (with `tokenizer`) or lists of token ids.
        answers: what follows each prompt, as text or token ids; None: decoded greedily.
        num_delta: number of delta layers to place, at most half of those above the warm-up.
        fields: the other fields of the result (budget, page_size, ...).

    Raises:
        ValueError: the contexts never exceed the budget, so there is nothing to select.
    """
    recorder = PageRecorder(method=cls(**fields), every=every)
    given = _answers(model, prompts, answers, recorder, tokenizer, max_new_tokens)
    if not recorder.recalls:
        raise ValueError(
            f"kvcomp.Delta.calibrate: no recorded step had more than budget="
            f"{recorder.method.budget} tokens; decode more, or choose a smaller budget"
        )
    recall = torch.stack(recorder.recalls).mean(0)
    warmup = recorder.method.num_warmup(len(recall))
    num_delta = min(num_delta, max(1, (len(recall) - warmup) // 2))
    chosen = best_layers(recall.tolist(), warmup, num_delta)
    found = replace(recorder.method, delta_layers=chosen)
    usual = replace(recorder.method, delta_layers=recorder.method.plan(len(recall)))
    if found == usual or len(usual.plan(len(recall))) > num_delta:
        return found

    def losses(method: Method) -> list[Tensor]:
        return answer_losses(model, prompts, given, method, tokenizer=tokenizer)

    return better(usual, [found], losses)


def best_layers(recall: list[list[float]], first: int, count: int) -> tuple[int, ...]:
    """Layers d0 = first < d1 < ... that maximise the sum over b of recall[last d <= b][b].

    Args:
        recall: recall[a][b] is the share of layer b's best pages that layer a's pages cover.
        first: the first layer of the set.
        count: size of the set, at most the number of layers left.
    """
    num_layers = len(recall)
    count = min(count, num_layers - first)
    # best[d]: (value of layers first..d-1, set) for sets of the current size that end at d.
    best: dict[int, tuple[float, tuple[int, ...]]] = {first: (0.0, (first,))}
    for _ in range(count - 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for last, (value, chosen) in best.items():
            for new in range(last + 1, num_layers):
                total = value + sum(recall[last][last:new])
                if new not in longer or total > longer[new][0]:
                    longer[new] = (total, (*chosen, new))
        best = longer
    return max(
        (value + sum(recall[last][last:]), chosen) for last, (value, chosen) in best.items()
    )[1]


def calibrate_lazy_eviction(
    cls: type[LazyEviction],
    model: PreTrainedModel,
    prompts: list,
    *,
    tokenizer: Any = None,
    answers: Sequence[Any] | None = None,
    max_new_tokens: int = 1024,
    alphas: Sequence[float] = ALPHAS,
    **fields: Any,
) -> LazyEviction:
    """Measure window and alpha on your own prompts; do not use the prompts of your test.

    The answers are read or written with dense attention. For each alpha the window follows the
    paper: it covers the longest interval of 80 % of the tokens that were hit, but is at most a
    quarter of the budget. The paper gives no rule for alpha; this takes the alpha with which the
    evicting model best predicts the answers. The default alpha and window stay unless they predict
    the answers clearly worse (`better`).

    Args:
        model: a Hugging Face causal LM.
        prompts: texts (with `tokenizer`) or lists of token ids.
        answers: what follows each prompt, as text or token ids; None: decoded greedily.
        max_new_tokens: length of a decoded answer; prompt and answer must exceed the budget.
        alphas: candidates; each costs another pass over the answers.
        fields: the other fields of the result (budget, unit, ...).

    Raises:
        ValueError: no context exceeded the budget, or no token was hit.
    """
    recorder = IntervalRecorder(unit=fields.get("unit", cls.unit), alphas=tuple(alphas))
    given = _answers(model, prompts, answers, recorder, tokenizer, max_new_tokens)
    budget = fields.get("budget", cls.budget)
    most = max(1, budget // 4)
    if recorder.longest_row <= budget + most:
        raise ValueError(
            f"kvcomp.LazyEviction.calibrate: no context had more than budget + window ="
            f" {budget + most} tokens, only {recorder.longest_row}; decode more, or choose a"
            " smaller budget"
        )

    def losses(method: Method) -> list[Tensor]:
        return answer_losses(model, prompts, given, method, tokenizer=tokenizer)

    default = cls(**{"window": min(cls.window, most), **fields})
    found = [
        cls(**{"alpha": alpha, "window": min(window, most), **fields})
        for alpha, window in recorder.windows().items()
    ]
    return better(default, found, losses)


def calibrate_louis_kv(
    cls: type[LouisKV],
    model: PreTrainedModel,
    prompts: list,
    *,
    tokenizer: Any = None,
    answers: Sequence[Any] | None = None,
    rate: float = CALIBRATED_RATE,
    max_new_tokens: int = 1024,
    **fields: Any,
) -> LouisKV:
    """Find the tau such that the similarity is below it in a share `rate` of the steps.

    The answers are read or written with dense attention, and the similarity of every step and layer
    that would retrieve is recorded.

    Args:
        model: a Hugging Face causal LM.
        prompts: texts (with `tokenizer`) or lists of token ids.
        answers: what follows each prompt, as text or token ids; None: decoded greedily.
        rate: retrievals per step and layer, 0 to 1.
        max_new_tokens: length of each answer.
        fields: the other fields of the result (budget, local, ...).

    Raises:
        ValueError: a rate outside [0, 1], or answers too short to compare two steps.
    """
    require(0 <= rate <= 1, "kvcomp.LouisKV.calibrate: rate", "0 to 1", rate)
    recorder = SimilarityRecorder(fields.get("dense_layers", cls.dense_layers))
    _answers(model, prompts, answers, recorder, tokenizer, max_new_tokens)
    seen = torch.cat(
        [torch.stack(steps).flatten() for steps in recorder.seen if steps] or [torch.zeros(0)]
    )
    seen = seen[seen.isfinite()]
    if not len(seen):
        raise ValueError(
            "kvcomp.LouisKV.calibrate: no two decode steps to compare; decode more tokens"
        )
    tau = seen.kthvalue(1 + round(rate * (len(seen) - 1))).values  # quantile() is limited in size
    return cls(**{"tau": round(tau.item(), 4), **fields})


CALIBRATIONS: dict[type[Method], Callable[..., Method]] = {
    Delta: calibrate_delta,
    LazyEviction: calibrate_lazy_eviction,
    LouisKV: calibrate_louis_kv,
}
