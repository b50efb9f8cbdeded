"""What the papers take for granted, looked for in the attention of a real model.

DELTA: a layer's important pages are important to the layers behind it. LazyEviction: tokens become
important again after an absence, most of them within a window. LouisKV: successive queries are
alike, and want the same tokens, until they turn. Delethink: what was carried on is enough.

All of it is of dense attention over windows of real text, one forward pass each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from harness.store import Row
from kvcomp import Delta
from kvcomp.reading import Window
from language.capture import Attention

EVERY = 32  # steps between those that are looked at, where not all are
SHARE = 4  # a set is a quarter of the tokens seen
ALPHAS = (1e-4, 1e-3, 1e-2, 5e-2)
TAUS = (0.6, 0.7, 0.8, 0.85, 0.9)
CARRIES = (64, 128, 256, 512)


def delta(attention: Attention, plan: tuple[int, ...], page: int = 16) -> Row:
    """How much of the attention mass of a layer's best tokens lies in pages chosen by another.

    Of each sparse layer b: the share of the mass of its best tokens (a quarter of them, per head)
    that is in the pages of its Δ-layer, in its own best pages, in the newest pages with the first
    one, and in pages at random; and of all pairs the first, [a][b].
    """
    layers = len(attention.layers)
    tokens = attention.layers[0][0].shape[1]
    steps = torch.arange(tokens // 2, tokens - 1, EVERY)
    generator = torch.Generator().manual_seed(0)
    masses, masks = [], []  # [heads, steps, pages] of the best tokens; [steps, pages]
    num_pages = tokens // page
    for layer in range(layers):
        probs = attention.probabilities(layer, steps)[..., : num_pages * page]
        best = torch.zeros_like(probs)
        scores = probs.amax(0).unflatten(-1, (num_pages, page)).sum(-1)
        chosen = torch.zeros(len(steps), num_pages)
        for row, step in enumerate(steps.tolist()):
            count = step // SHARE
            top = probs[:, row].topk(count, -1)
            best[:, row].scatter_(-1, top.indices, top.values)
            chosen[row, scores[row].topk(count // page).indices] = 1
        masses.append(best.unflatten(-1, (num_pages, page)).sum(-1))
        masks.append(chosen)
    others: dict[str, Tensor] = {}
    newest, at_random = torch.zeros_like(masks[0]), torch.zeros_like(masks[0])
    for row, step in enumerate(steps.tolist()):
        last, count = step // page, step // SHARE // page
        newest[row, [0, *range(last - count + 2, min(last + 1, num_pages))]] = 1
        at_random[row, torch.randperm(last, generator=generator)[:count]] = 1
    others["newest"], others["random"] = newest, at_random

    def caught(mask: Tensor, b: int) -> float:
        mass = masses[b]
        return ((mass * mask).sum(-1) / mass.sum(-1)).mean().item()

    pairs = [[round(caught(masks[a], b), 4) for b in range(layers)] for a in range(layers)]
    dense = {*range(plan[0]), *plan}  # the warm-up, and the Δ-layers
    sparse = [b for b in range(layers) if b not in dense]
    planner = {b: max(a for a in plan if a < b) for b in sparse}
    return {
        "plan": list(plan),
        "by_layer": {str(b): round(pairs[planner[b]][b], 4) for b in sparse},
        "caught": sum(pairs[planner[b]][b] for b in sparse) / len(sparse),
        "own": sum(pairs[b][b] for b in sparse) / len(sparse),
        **{
            name: sum(caught(mask, b) for b in sparse) / len(sparse)
            for name, mask in others.items()
        },
        "pairs": pairs,
    }


def recurrence(attention: Attention, group: int, absence: int = 64) -> list[Row]:
    """Of each alpha: how often tokens are hit, and after which intervals again.

    A token is hit in a step where its probability reaches alpha under any head of a KV head. Steps
    are those of the second half, for tokens of the first half; `absence` is a silence of so many
    steps.
    """
    tokens = attention.layers[0][0].shape[1]
    half = tokens // 2
    found = []
    for alpha in ALPHAS:
        gaps, longest, hits, recurring, seen = [], [], 0, 0, 0
        for layer in range(len(attention.layers)):
            probs = attention.probabilities(layer, torch.arange(half, tokens))[..., :half]
            hit = (probs.unflatten(0, (-1, group)).amax(1) >= alpha).flatten(0, 0)  # [Hkv, S, T]
            steps = torch.arange(hit.shape[1])[None, :, None].expand_as(hit)
            last = torch.where(hit, steps, -1).cummax(1).values
            before = torch.nn.functional.pad(last, (0, 0, 1, 0), value=-1)[:, :-1]
            gap = torch.where(hit & (before >= 0), steps - before, 0)
            gaps.append(gap[gap > 0].flatten())
            most = gap.amax(1)
            longest.append(most[most > 0].flatten())
            hits += int(hit.sum())
            recurring += int((most > absence).sum())
            seen += most.numel()
        gap, most = torch.cat(gaps).float(), torch.cat(longest).float()
        found.append(
            {
                "alpha": alpha,
                "hits_per_step": hits / (len(attention.layers) * hit.shape[0] * hit.shape[1]),
                "of_tokens": half,
                "hit_again": len(most) / seen,
                "recur_after_absence": recurring / seen,
                "absence": absence,
                "interval_median": _quantile(gap, 0.5),
                "interval_80": _quantile(gap, 0.8),
                "longest_80": _quantile(most, 0.8),
            }
        )
    return found


def similarity(attention: Attention, group: int, dense_layers: int) -> Row:
    """Of successive queries: their cosine by layer, how often it is below tau, and how much of a
    KV head's best tokens the next step shares."""
    cosines, overlaps = [], []
    for layer in range(dense_layers, len(attention.layers)):
        q = attention.layers[layer][0]
        cosines.append(cosine_similarity(q[:, 1:], q[:, :-1], dim=-1).mean(0))  # over heads
        steps = torch.arange(q.shape[1] // 2, q.shape[1] - 1, EVERY)
        now, later = (
            attention.probabilities(layer, steps + shift).unflatten(0, (-1, group)).mean(1)
            for shift in (0, 1)
        )
        for row, step in enumerate(steps.tolist()):
            count = step // SHARE
            a, b = (p[:, row].topk(count, -1).indices for p in (now, later))
            shared = [torch.isin(x, y).float().mean() for x, y in zip(a, b, strict=True)]
            overlaps.append(torch.stack(shared).mean())
    cosine = torch.stack(cosines)  # [layers, steps]
    return {
        "by_layer": [round(value, 4) for value in cosine.mean(1).tolist()],
        "cosine": cosine.mean().item(),
        "trigger_rate": {str(tau): (cosine < tau).float().mean().item() for tau in TAUS},
        "overlap": torch.stack(overlaps).mean().item(),
        "overlap_by_chance": 1 / SHARE,
    }


@torch.no_grad()
def carry(model: Any, head: Any, window: Window) -> list[Row]:
    """Loss of the last quarter of a window by how many tokens before it are carried on, behind a
    head of an eighth of the window, as Delethink keeps the question."""
    ids = torch.tensor(window.ids, device=model.device)
    question, chunk = len(ids) // 8, len(ids) // 4
    found = []
    for size in (*CARRIES, None):
        first = question if size is None else max(question, len(ids) - chunk - size)
        kept = torch.cat([ids[:question], ids[first:]])
        hidden = model.get_decoder()(kept[None, :-1], use_cache=False).last_hidden_state
        part = hidden[0, -chunk:].float()
        p = torch.nn.functional.linear(part, head).log_softmax(-1)
        loss = -p.gather(1, kept[-chunk:, None]).mean().item()
        found.append({"carry": size, "nll": loss})
    return found


def look(model: Any, window: Window) -> Row:
    """All of it, for one window."""
    ids = torch.tensor(window.ids, device=model.device)
    attention = Attention(model, ids)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    plan = Delta().plan(len(attention.layers))
    head = model.get_output_embeddings().weight.float()
    return {
        "text": window.text,
        "first": window.first,
        "delta": delta(attention, plan),
        "recurrence": recurrence(attention, group),
        "similarity": similarity(attention, group, plan[0]),
        "carry": carry(model, head, window),
    }


def verdicts(rows: list[Row]) -> list[str]:
    """The tables over all windows, a line each."""
    count = len(rows)

    def mean(pick: Any) -> float:
        return sum(pick(row) for row in rows) / count

    lines = [
        "DELTA: share of the mass of a layer's best quarter of the tokens that pages catch",
        *(
            f"  {name:8} {mean(lambda row, name=name: row['delta'][name]):.1%}"
            for name in ("own", "caught", "newest", "random")
        ),
        "LazyEviction: tokens of the first half, in the steps of the second",
    ]
    for place, alpha in enumerate(ALPHAS):

        def of(name: str, place: int = place) -> float:
            return mean(lambda row: row["recurrence"][place][name])

        lines.append(
            f"  alpha {alpha:g}: {of('hits_per_step'):.1f} hits a step, {of('hit_again'):.1%} hit"
            f" again, {of('recur_after_absence'):.1%} after more than 64 steps of silence;"
            f" intervals: median {of('interval_median'):.0f}, 80 % {of('interval_80'):.0f},"
            f" 80 % of the longest {of('longest_80'):.0f}"
        )
    rates = {
        tau: mean(lambda row, tau=tau: row["similarity"]["trigger_rate"][str(tau)]) for tau in TAUS
    }
    lines += [
        "LouisKV: cosine of successive queries"
        f" {mean(lambda row: row['similarity']['cosine']):.3f}",
        "  below tau: " + ", ".join(f"{tau:g} {rate:.1%}" for tau, rate in rates.items()),
        f"  best quarter shared with the next step:"
        f" {mean(lambda row: row['similarity']['overlap']):.1%}",
        "Delethink: loss of the last quarter by tokens carried on",
        "  "
        + ", ".join(
            f"{each['carry'] or 'all'}"
            f" {mean(lambda row, place=place: row['carry'][place]['nll']):.3f}"
            for place, each in enumerate(rows[0]["carry"])
        ),
    ]
    return lines


def _quantile(values: Tensor, share: float) -> float:
    """By counting: there may be too many values for torch.quantile."""
    if not len(values):
        return 0.0
    return values.kthvalue(1 + int(share * (len(values) - 1))).values.item()
