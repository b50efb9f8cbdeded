"""Latent-Trajectory signals (arXiv 2510.10494): how far, and how straight, a thought has moved.

The tokens of a thought are cut into blocks; h_n is the mean hidden state of block n behind a layer.
With drift d = h_N - h_1:

    net         |d| / (N - 1)
    cumulative  sum_n |h_n - h_(n-1)|
    aligned     mean_n cos(h_n - h_(n-1), d)

per layer; here their mean over layers ranks rows. The paper computes them by a second forward over
the finished text. Here they are summed up while the text is decoded, which is the same under dense
attention; while it goes on, the latest block stands for the last. The cumulative change is not
divided by N, so over rows of different lengths it is largely length, which is why that is a signal
here too.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvcomp.hf.run import Run
from kvcomp.thinking.checks import is_count, require
from kvcomp.thinking.rows import Processors, Rows, Sampling
from kvcomp.thinking.votes import AnswerOf, Result, boxed, settle

# Signal -> whether rows with much of it rank first. Of the published ones only the second is sure.
SIGNALS = {"net": True, "cumulative": False, "aligned": True, "length": False}


def signals(means: Tensor) -> dict[str, Tensor]:
    """Of means of blocks [N, L, B, d] fp32: [B] each, averaged over layers; NaN where N < 2."""
    count = len(means)
    if count < 2:
        nothing = torch.full(means.shape[2:3], float("nan"))
        return {"net": nothing, "cumulative": nothing.clone(), "aligned": nothing.clone()}
    drift, moves = means[-1] - means[0], means.diff(dim=0)
    return {
        "net": drift.norm(dim=-1).mean(0) / (count - 1),
        "cumulative": moves.norm(dim=-1).sum(0).mean(0),
        "aligned": cosine_similarity(moves, drift[None], dim=-1).mean(0).mean(0),
    }


class LatentTrajectory:
    """Listens to decode steps between `with` and its end; a `Follower` of `Rows`.

    Args:
        run: of `kvcomp.patch`.
        block: tokens per block; the paper's 500.

    Raises:
        ValueError: a block of no token, or no run.
    """

    def __init__(self, run: Run, block: int = 500) -> None:
        require(isinstance(run, Run), "LatentTrajectory: run", "what kvcomp.patch returns", run)
        require(is_count(block, 1), "LatentTrajectory: block", "tokens, at least 1", block)
        self.run, self.block = run, block
        layers: Any = getattr(run.decoder, "layers", None)
        require(layers is not None, "LatentTrajectory: run", "a model with layers", run.decoder)
        self.layers = list(layers)
        self.tokens = 0  # of each row, so far
        self._means: list[Tensor] = []  # [L, B, d] of each whole block, on the host
        self._sums: list[Tensor] = []  # [B, d] of the block under way, by layer
        self._hooks: list[Any] = []

    def __enter__(self) -> LatentTrajectory:
        for place, layer in enumerate(self.layers):
            hook = layer.register_forward_hook(
                lambda module, given, output, place=place: self._take(place, output)
            )
            self._hooks.append(hook)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def select(self, rows: Tensor) -> None:
        """Rows of the batch become `rows` ([B'] int64 indices)."""
        self._means = [each[:, rows.to(each.device)] for each in self._means]
        self._sums = [each[rows.to(each.device)] for each in self._sums]

    def signals(self) -> dict[str, Tensor]:
        """Of the rows in the batch, [B] each; NaN before there are two blocks."""
        means = list(self._means)
        if rest := self.tokens % self.block:
            means.append((torch.stack(self._sums) / rest).cpu())
        require(bool(means), "LatentTrajectory", "decode steps to have listened to", "none")
        return signals(torch.stack(means))

    def _take(self, place: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] != 1 or self.run.trying or self.run.encoding:
            return  # a prompt, or no step of these rows
        newest = hidden[:, 0].detach().float()
        if place == len(self._sums):
            self._sums.append(newest)
        else:
            self._sums[place] = self._sums[place] + newest
        if place == len(self.layers) - 1:
            self.tokens += 1
            if self.tokens % self.block == 0:
                self._means.append((torch.stack(self._sums) / self.block).cpu())
                self._sums.clear()


def latent_trajectory(
    run: Run,
    tokenizer: Any,
    inputs: Any,
    *,
    k: int = 8,
    keep: int = 4,
    at: int = 2000,
    block: int = 500,
    signal: str = "cumulative",
    answer_of: AnswerOf = boxed,
    processors: Processors = (),
    **sampling: Any,
) -> Result:
    """Begin k rows, go on with the `keep` of the best signal after `at` tokens, and vote.

    Args:
        inputs: of one prompt: "input_ids" [1, n].
        signal: of `SIGNALS`; "length" keeps the rows that have ended already, the shorter first.
        sampling: fields of `Sampling`.

    Returns:
        the majority of the rows kept, a tie going to the shortest; those that were cut off at
        `max_new_tokens` vote only where none has ended. `lengths` are those of the voters.

    Raises:
        ValueError: keep is not in 1..k, fewer tokens than two blocks or as many as a row has at
            most, an unknown signal, or several prompts.
    """
    where = "latent_trajectory"
    require(is_count(k, 1), f"{where}: k", "rows, at least 1", k)
    require(is_count(keep, 1) and keep <= k, f"{where}: keep", f"in 1..k={k}", keep)
    require(is_count(block, 1), f"{where}: block", "tokens, at least 1", block)
    least = block + 2  # the token of a step is heard in the next one
    require(is_count(at, least), f"{where}: at", f"two blocks, at least {least} tokens", at)
    drawn = Sampling(**sampling)
    most = drawn.max_new_tokens  # rows that are cut off before would never be ranked
    require(at < most, f"{where}: at", f"fewer tokens than max_new_tokens={most}", at)
    require(signal in SIGNALS, f"{where}: signal", f"one of {', '.join(SIGNALS)}", signal)
    require(len(inputs["input_ids"]) == 1, f"{where}: inputs", "one prompt", "several")
    with LatentTrajectory(run, block) as heard:
        rows = Rows(run, inputs, drawn, copies=k, processors=processors, followers=[heard])
        require(at < rows.most, f"{where}: at", f"fewer than the {rows.most} tokens of a row", at)
        while rows.live and len(rows.live[0].ids) < at:
            rows.step()
        ended = [row for row in rows.all if row.ended]
        free = max(keep - len(ended), 0)  # rows that have ended cost no more, and have a vote
        if free < len(rows.live):
            best = list(range(len(rows.live)))
            if signal != "length":
                worth = heard.signals()[signal].tolist()
                sign = -1 if SIGNALS[signal] else 1
                best = sorted(best, key=lambda place: sign * worth[place])
            rows.keep([rows.live[place] for place in best[:free]])
    kept = [*ended, *rows.live]
    rows.finish()
    lengths = {row.number: len(row.ids) for row in kept if row.ended}
    voters = [row for row in kept if row.ended] or kept
    lengths = lengths or {row.number: len(row.ids) for row in kept}
    result = settle(rows, voters, lengths, tokenizer, answer_of)
    result.finished = sum(row.ended for row in rows.all)
    return result
