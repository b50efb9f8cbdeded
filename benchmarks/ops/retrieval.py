"""kmeans, query_similarity, segment_boundaries, store_segments, unit_scores, select_units."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contenders import Against, Contender, Expected, Settings, implementations, measure
from harness.record import Row
from kvcomp.ops import OPS
from kvcomp.probe import copy_probe
from ops.common import DTYPES, PEAK, plain_contenders
from ops.fetching import BUDGET, CLUSTER, LOCAL, SINKS

WINDOW = 8192  # LouisKV's
ITERATIONS = 10

# --- kmeans ---------------------------------------------------------------------------------------


def bench_kmeans(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Bound by arithmetic: GB/s counts the keys once an iteration, and says little.

    `matmul` is the product of keys and centres alone, of all iterations. The libraries cluster one
    head's window after the other, centred for them in advance, by Euclidean distance or by their
    own rule for empty clusters.
    """
    _, kv_heads, dim = options.shape[0]
    for tokens in options.tokens:
        for heads in (1, kv_heads):
            for dtype in options.dtype:
                sets = [_keys(heads, tokens, dim, DTYPES[dtype], run.device) for _ in range(2)]
                contenders = list(_kmeans_contenders(sets[0], heads == 1, run))
                shape = f"B=1 H={heads}x{dim} n={tokens} c={CLUSTER} I={ITERATIONS}"
                yield measure("kmeans", shape, dtype, sets, contenders, run)


def _keys(heads: int, tokens: int, dim: int, dtype: torch.dtype, device: str) -> tuple:
    """Words of a small vocabulary in runs of a topic, around a common key, turned by position."""
    random = partial(torch.randn, device=device)
    below = partial(torch.randint, device=device)
    topic = random(heads, 40, dim)[:, below(40, (tokens // 32 + 1,)).repeat_interleave(32)]
    word = random(heads, 500, dim)[:, below(500, (tokens,))]
    x = topic[:, :tokens] + word + 0.5 * random(heads, tokens, dim) + 2 * random(heads, 1, dim)
    frequency = 1e6 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.arange(tokens, device=device)[:, None] * frequency
    a, b = x.chunk(2, -1)
    turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    bounds = torch.tensor([[0], [tokens]], dtype=torch.int32, device=device)
    return turned[None].to(dtype), *bounds, CLUSTER, WINDOW, ITERATIONS


def _windows(keys: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Centred keys [H, m, D] of each window, and the first centres [H, k, D]."""
    for x in keys[0].float().split(WINDOW, 1):
        x = x - x.mean(1, keepdim=True)
        tokens = x.shape[1]
        count = max(1, (2 * tokens + CLUSTER) // (2 * CLUSTER))
        first = torch.arange(count, device=x.device) * tokens // count
        yield x, F.normalize(x[:, first], dim=-1)


def _closeness(keys: Tensor, labels: Tensor) -> Tensor:
    """What k-means raises, [H]: tokens' mean cosine to their centre. Labels that a near tie has
    turned are as good."""
    total = torch.zeros(keys.shape[1], dtype=torch.float64, device=keys.device)
    for (x, _), label in zip(_windows(keys), labels[0].split(WINDOW, 1), strict=True):
        x, index = x.double(), label.long()[..., None].expand_as(x)
        centre = x.new_zeros(len(x), int(label.max()) + 1, x.shape[2]).scatter_add_(1, index, x)
        total += F.cosine_similarity(x, centre.gather(1, index), dim=-1).sum(1)
    return total / keys.shape[2]


def _torch_kmeans(x: tuple) -> tuple[Tensor]:
    labels, base = [], 0
    for keys, centre in _windows(x[0]):
        heads, count, _ = centre.shape
        offset = torch.arange(heads, device=keys.device)[:, None] * count
        for _ in range(ITERATIONS):
            label = (keys @ centre.transpose(1, 2)).argmax(-1)
            total = torch.zeros_like(centre).flatten(0, 1)
            total.index_add_(0, (label + offset).flatten(), keys.flatten(0, 1))
            empty = torch.bincount((label + offset).flatten(), minlength=heads * count) == 0
            moved = F.normalize(total, dim=-1).view_as(centre)
            centre = torch.where(empty.view(heads, count, 1), centre, moved)
        labels.append(label + base)
        base += count
    return (torch.cat(labels, 1)[None],)


def _matmul(x: tuple) -> None:
    for keys, centre in _windows(x[0]):
        product = keys.new_empty(*keys.shape[:2], centre.shape[1])
        for _ in range(ITERATIONS):
            torch.bmm(keys, centre.transpose(1, 2), out=product)


def _sklearn_kmeans(windows: list) -> None:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(torch.get_num_threads()):
        for keys, first in windows:
            KMeans(len(first), init=first, n_init=1, max_iter=ITERATIONS, tol=0).fit(keys)


def _faiss_kmeans(windows: list) -> None:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    for keys, first in windows:
        points = {"min_points_per_centroid": 1, "max_points_per_centroid": len(keys)}
        kmeans = faiss.Kmeans(keys.shape[1], len(first), niter=ITERATIONS, spherical=True, **points)
        kmeans.train(keys, init_centroids=first)


def _kmeans_contenders(x: tuple, libraries: bool, run: Settings) -> Iterator[Contender]:
    reference = OPS["kmeans"].reference
    expected = Expected(lambda *args: _closeness(args[0], reference(*args)[0]), x)
    keys = x[0]
    moved = ITERATIONS * keys.numel() * keys.itemsize

    def results(x: tuple, result: tuple) -> tuple[Tensor]:
        return (_closeness(x[0], result[0]),)

    yield Contender("torch", _torch_kmeans, moved, expected=expected, ours=False, results=results)
    baselines: dict[str, Callable] = {"matmul": _matmul}
    if libraries and run.device == "cpu" and keys.dtype == torch.float32:
        windows = [(a[0].numpy(), b[0].numpy()) for a, b in _windows(keys)]
        for name, module, call in (
            ("sklearn", "sklearn", _sklearn_kmeans),
            ("faiss", "faiss", _faiss_kmeans),
        ):
            if find_spec(module):
                baselines[name] = lambda _, call=call: call(windows)
    for name, call in baselines.items():
        yield Contender(name, call, moved, ours=False)
    against = tuple(Against(name, name) for name in ("torch", *baselines))
    for name in implementations("kmeans", run.device, moved):
        yield Contender(
            name,
            lambda x, impl=OPS["kmeans"].impls[name]: impl(*x),
            moved,
            expected=expected,
            ours=False,  # the budget of a closeness, not that of a label
            against=against,
            results=results,
        )


# --- query_similarity -----------------------------------------------------------------------------


def bench_query_similarity(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Warm: the queries have just been computed."""
    for heads, _, dim in options.shape:
        for batch in (1, 8):
            for dtype in options.dtype:
                random = partial(torch.randn, batch, heads, dim, device=run.device)
                steps = [(random(), random()) for _ in range(8)]
                sets = [((x + 0.3 * y).to(DTYPES[dtype]), x.to(DTYPES[dtype])) for x, y in steps]
                moved = 3 * batch * heads * dim * DTYPES[dtype].itemsize
                contenders = plain_contenders(
                    "query_similarity",
                    sets[0],
                    moved,
                    {"torch": _torch_similarity},
                    run,
                    results=lambda x, similarity: (similarity, x[1]),
                )
                shape = f"B={batch} Hq={heads}x{dim}"
                yield measure("query_similarity", shape, dtype, sets, contenders, run)


def _torch_similarity(x: tuple) -> Tensor:
    q, previous = x
    similarity = F.cosine_similarity(q, previous, dim=-1).mean(1)
    previous.copy_(q)
    return similarity


# --- segment_boundaries ---------------------------------------------------------------------------


def bench_segment_boundaries(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Warm, and the commonest step: no segment ends. PyTorch only finds that out."""
    _, heads, _ = options.shape[0]
    for batch in (1, 8):
        integers = partial(torch.full, (batch,), dtype=torch.int32, device=run.device)
        starts = torch.arange(0, 4096, CLUSTER, device=run.device).int()
        args = (
            torch.full((batch,), 0.9, device=run.device),
            integers(4075),
            starts.expand(batch, heads, -1).contiguous(),
            integers(254),
            integers(250),
            *(0.7, 0.7, 4, 64, LOCAL),
        )
        contenders = plain_contenders(
            "segment_boundaries",
            args,
            batch * 4 * 7,
            {"torch": _torch_boundaries},
            run,
            results=lambda x, both: (*both, *x[2:5]),
        )
        yield measure("segment_boundaries", f"B={batch} H={heads}", "fp32", [args], contenders, run)


def _torch_boundaries(x: tuple) -> tuple[Tensor, Tensor]:
    similarity, lengths, starts, num_units, num_indexed, cut, retrieve, least, most, local = x
    newest = lengths - 1
    first_open, first_local = (
        starts[:, 0].gather(1, units[:, None].long())[:, 0] for units in (num_units, num_indexed)
    )
    count = newest - first_open
    ends = (count > 0) & (((similarity < cut) & (count >= least)) | (count >= most))
    triggered = (similarity < retrieve) | (newest - first_local >= local + most)
    return count * ends, triggered.int()


# --- store_segments -------------------------------------------------------------------------------


def bench_store_segments(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Lukewarm: most of a segment's tokens have been attended to a step ago."""
    run = replace(run, probe=copy_probe(run.device, run.probe.bytes))
    _, heads, dim = options.shape[0]
    for tokens in (16, 64):
        for dtype in options.dtype:
            moved = 4 * heads * tokens * dim * DTYPES[dtype].itemsize
            sets = [_closed(heads, dim, tokens, DTYPES[dtype], run.device) for _ in range(4)]
            contenders = plain_contenders(
                "store_segments",
                sets[0],
                moved,
                {"torch": _torch_store},
                run,
                results=lambda x, _: (x[8], *x[7]),
            )
            shape = f"B=1 H={heads}x{dim} n={SINKS + BUDGET + LOCAL} segment={tokens}"
            yield measure("store_segments", shape, dtype, sets, contenders, run)


def _closed(heads: int, dim: int, tokens: int, dtype: torch.dtype, device: str) -> tuple:
    slots, rows, units = SINKS + BUDGET + LOCAL, 4096, 256
    random = partial(torch.randn, device=device, dtype=dtype)
    held = torch.stack([torch.randperm(rows - tokens)[: slots - tokens] for _ in range(heads)])
    newest = torch.arange(rows - tokens, rows).expand(heads, -1)
    starts = torch.zeros(1, heads, units + 1, dtype=torch.int32)
    starts[..., -2:] = torch.tensor([rows - tokens, rows])
    integers = partial(torch.full, (1,), dtype=torch.int32, device=device)
    return (
        random(1, heads, slots, dim),
        random(1, heads, slots, dim),
        torch.cat([held, newest], 1)[None].int().to(device),
        integers(slots),
        starts.to(device),
        integers(units),
        integers(tokens),
        [torch.zeros(1, heads, rows, 2, dim, dtype=dtype, pin_memory=device == "cuda")],
        torch.zeros(1, heads, units, dim, dtype=dtype, device=device),
    )


def _torch_store(x: tuple) -> None:
    k, v, slot_rows, _, starts, _, closed, (block,), centroids = x
    begin, end = starts[0, 0, -2:].tolist()
    tokens = int(closed[0])
    slots = ((slot_rows[0] >= begin) & (slot_rows[0] < end)).nonzero()[:, 1].view(-1, tokens)
    order = slot_rows[0].gather(1, slots).argsort(1)
    index = slots.gather(1, order)[..., None]
    for part, source in enumerate((k, v)):
        chosen = source[0].take_along_dim(index, 1)
        block[0, :, begin:end, part] = chosen
        if source is k:
            centroids[0, :, -1] = chosen.mean(1)


# --- unit_scores ----------------------------------------------------------------------------------


def bench_unit_scores(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Cold: centroids are read at a selection only."""
    for heads, kv_heads, dim in options.shape:
        for units in options.unit_counts:
            for dtype in options.dtype:
                moved = kv_heads * units * (dim * DTYPES[dtype].itemsize + 8)
                sets = [
                    _centroids(heads, kv_heads, dim, units, DTYPES[dtype], run.device)
                    for _ in range(run.num_sets(moved))
                ]
                contenders = plain_contenders(
                    "unit_scores", sets[0], moved, {"torch": _torch_unit_scores}, run
                )
                shape = f"B=1 {heads}/{kv_heads}x{dim} U={units}"
                yield measure("unit_scores", shape, dtype, sets, contenders, run)


def _centroids(
    heads: int, kv_heads: int, dim: int, units: int, dtype: torch.dtype, device: str
) -> tuple:
    random = partial(torch.randn, device=device)
    starts, num_indexed, active = _bounds(kv_heads, units, device)
    q = (random(1, heads, dim) * PEAK).to(dtype)
    centroids = random(1, kv_heads, units, dim).to(dtype)
    return q, centroids, starts, num_indexed, active, dim**-0.5


def _bounds(heads: int, units: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """starts [1, H, U + 1] of units of 1 to 31 tokens; num_indexed; active."""
    sizes = torch.randint(1, 2 * CLUSTER, (1, heads, units), device=device)
    starts = F.pad(sizes.cumsum(-1), (1, 0)).int()
    integers = partial(torch.full, (1,), dtype=torch.int32, device=device)
    return starts, integers(units), integers(1)


def _torch_unit_scores(x: tuple) -> Tensor:
    """Of units that all exist."""
    q, centroids, *_, scale = x
    grouped = q.unflatten(1, (centroids.shape[1], -1)) * scale
    return (grouped @ centroids.mT).softmax(-1, dtype=torch.float32).mean(2).to(q.dtype)


# --- select_units ---------------------------------------------------------------------------------


def bench_select_units(options: argparse.Namespace, run: Settings) -> Iterator[list[Row]]:
    """Warm: the scores have just been computed.

    torch.topk takes the best 1/16 of the budget's tokens as if all units had 16, and their rows.
    """
    _, heads, _ = options.shape[0]
    for units in options.unit_counts:
        budget = min(BUDGET, 2 * units)
        sets = [_unit_choice(heads, units, budget, run.device) for _ in range(8)]
        moved = heads * 4 * (2 * units + budget)
        baselines = {"topk": _topk_units, "torch-sort": lambda x: OPS["select_units"].reference(*x)}
        contenders = plain_contenders(
            "select_units", sets[0], moved, baselines, run, trust=("topk",)
        )
        shape = f"B=1 H={heads} U={units} K={budget}"
        yield measure("select_units", shape, "fp32", sets, contenders, run)


def _unit_choice(heads: int, units: int, budget: int, device: str) -> tuple:
    scores = (torch.randn(1, heads, units, device=device) * PEAK).softmax(-1)
    return scores, *_bounds(heads, units, device), budget


def _topk_units(x: tuple) -> Tensor:
    scores, starts, _, _, budget = x
    best = scores.topk(max(1, budget // CLUSTER), sorted=False).indices.sort(-1).values
    offset = torch.arange(CLUSTER, device=scores.device)
    return (starts.gather(-1, best)[..., None] + offset).flatten(-2)
