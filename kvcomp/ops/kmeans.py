"""kmeans: cluster the keys of each head, window by window."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kvcomp.ops._registry import bind, raw_stream


def kmeans(
    keys: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    cluster_size: int = 16,
    window: int = 8192,
    iterations: int = 10,
) -> tuple[Tensor, Tensor, Tensor]:
    """Deterministic spherical k-means of each head's keys, `window` tokens at a time.

    A row's tokens [first, last) are cut into windows, and each window is clustered by itself: m
    tokens give k = max(1, round(m / cluster_size)) clusters. The mean key of the window is
    subtracted first, because keys share a large common part. The initial centres are tokens
    floor(i m / k) for i < k. In each iteration a token joins the centre with the largest inner
    product, ties to the first, and each centre becomes the normalised mean of its tokens; a centre
    without tokens stays. The op returns the last assignment and the plain means of the uncentred
    keys.

    Args:
        keys: [B, H, N, D]; fp32, fp16 or bf16; any strides on B, H and N, D contiguous, a multiple
            of 16 and at most 1024.
        first, last: [B] int32, 0 <= first <= last <= N.
        cluster_size: mean tokens in a cluster.
        window: tokens clustered together.
        iterations: assignments, at least 1.

    Returns:
        labels [B, H, N] int32: the cluster of each token in [first, last), counted over all windows
        of the row; -1 for other tokens. centroids [B, H, K, D] of keys' dtype and sizes [B, H, K]
        int32 with K = `num_clusters(N, ...)`; both are 0 for empty and unused clusters.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout; numbers below 1; on the CPU
            also invalid ranges.

    Source: RetroInfer (arXiv 2505.02922, section 4), whose recipe LouisKV uses.
    """
    return _op(keys, first, last, cluster_size, window, iterations)


def num_clusters(tokens: int, cluster_size: int, window: int) -> int:
    """Clusters of a row of `tokens` tokens, over all of its windows."""

    def of_window(count: int) -> int:
        return max(1, (2 * count + cluster_size) // (2 * cluster_size))

    rest = tokens % window
    return tokens // window * of_window(window) + (of_window(rest) if rest else 0)


def reference(keys, first, last, cluster_size, window, iterations):
    labels, centroids, sizes = fake(keys, first, last, cluster_size, window, iterations)
    labels.fill_(-1), centroids.zero_(), sizes.zero_()
    for row, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        for start in range(begin, end, window):
            stop = min(start + window, end)
            base = num_clusters(start - begin, cluster_size, window)
            count = num_clusters(stop - start, cluster_size, window)
            x = keys[row, :, start:stop]  # [H, m, D]
            label, centre, size = _cluster(x, count, iterations)
            labels[row, :, start:stop] = base + label
            centroids[row, :, base : base + count] = centre
            sizes[row, :, base : base + count] = size
    return labels, centroids, sizes


def _cluster(x: Tensor, count: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """One window: x [H, m, D] -> labels [H, m], centroids [H, count, D], sizes [H, count]."""
    heads, tokens, dim = x.shape
    centred = x - x.mean(1, keepdim=True)
    first = torch.arange(count, device=x.device) * tokens // count
    centre = _normalised(centred[:, first])
    for _ in range(iterations):
        label = (centred @ centre.transpose(1, 2)).max(-1).indices  # ties: max gives the first
        member = label[..., None].expand(-1, -1, dim)
        size = x.new_zeros(heads, count).scatter_add_(1, label, x.new_ones(heads, tokens))
        mean = torch.zeros_like(centre).scatter_add_(1, member, centred)
        mean = mean / size.clamp(min=1)[..., None]
        centre = torch.where(size[..., None] > 0, _normalised(mean), centre)
    total = torch.zeros_like(centre).scatter_add_(1, member, x)
    return label.int(), total / size.clamp(min=1)[..., None], size.int()


def _normalised(x: Tensor) -> Tensor:
    length = x.norm(dim=-1, keepdim=True)
    return x / length.where(length > 0, 1.0)


def fake(keys, first, last, cluster_size, window, iterations):
    batch, heads, tokens, dim = keys.shape
    # Numbers that make no sense reach the native checks, which say so.
    total = num_clusters(tokens, max(cluster_size, 1), max(window, 1))
    labels = keys.new_empty(batch, heads, tokens, dtype=torch.int32)
    centroids = keys.new_empty(batch, heads, total, dim)
    return labels, centroids, keys.new_empty(batch, heads, total, dtype=torch.int32)


def native(extension: ModuleType, backend: int) -> Callable:
    def run(keys, first, last, cluster_size, window, iterations):
        labels, centroids, sizes = fake(keys, first, last, cluster_size, window, iterations)
        extension.kmeans(
            backend,
            keys,
            first,
            last,
            labels,
            centroids,
            sizes,
            cluster_size,
            window,
            iterations,
            raw_stream(keys),
        )
        return labels, centroids, sizes

    return run


_op = bind(
    "kmeans",
    "(Tensor keys, Tensor first, Tensor last, int cluster_size, int window, int iterations)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=fake,
    native=native,
    triton=True,
)
