"""kmeans in Triton: two kernels an iteration, and no float is ever added atomically.

Each grid is (parts of windows, H, B), sized for rows of N tokens; programs past the end of their
row return. `assign_labels` keeps a tile of centred keys on chip, streams the centres of the window
past it and notes, for every two columns of the tile of products, the largest product so far and
its centre: three instructions a product, and the columns meet only once, at the end.
`update_centres` owns a block of clusters: it lists their tokens in order, gathers those keys, and
adds them up as a product with the one-hot matrix of their labels. It always leaves both what the
next iteration wants (normalised means of centred keys) and what the call returns (plain means,
sizes). FLOPs of an iteration: 2 N k D per head for k clusters in a window; bytes: each key twice,
each label 2 k / BLOCK_C times and each centre window / BLOCK_T times, which come from L2.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcomp.ops.kmeans import num_clusters
from kvcomp.ops.triton import COMPILE, dot, on_its_device

# They differ from prompt to prompt: no second compilation at a multiple of 16.
VARYING = ["num_tokens", "num_clusters", "window", "cluster_size"]


@cache
def config(head_dim: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Tiles of assign_labels and of update_centres."""
    if dtype == torch.float32:  # full-precision products run on the CUDA cores: tests, small jobs
        assign, update = (32, 32, 8, 2), (16, 16, 8, 2)
    elif head_dim <= 128:  # two programs an SM: one multiplies while the other compares
        assign, update = (128, 64, 4, 3), (64, 32, 8, 5)
    else:
        assign, update = (128, 64, 8, 2), (32, 32, 8, 5)
    names = "BLOCK_T", "BLOCK_C", "num_warps", "num_stages"
    return dict(zip(names, assign, strict=True)), dict(zip(names, update, strict=True))


@triton.jit
def tokens_in(first, last, i_b, i_w, num_tokens, window):
    """Where window i_w of a row begins, and how many tokens it has: none past the row's end."""
    b_first = tl.maximum(tl.load(first + i_b), 0)
    b_last = tl.minimum(tl.load(last + i_b), num_tokens)
    i_begin = b_first + i_w * window
    return i_begin.to(tl.int64), tl.minimum(tl.maximum(b_last - i_begin, 0), window)


@triton.jit
def clusters_in(num_tokens, cluster_size):
    """Clusters of a window that is not empty."""
    return tl.maximum((2 * num_tokens + cluster_size) // (2 * cluster_size), 1)


@triton.jit
def normalised(b_x):
    """Rows of unit length; those of zeros stay."""
    b_length = tl.sqrt(tl.sum(b_x * b_x, 1))
    return b_x / tl.where(b_length > 0, b_length, 1.0)[:, None]


@triton.jit(do_not_specialize=VARYING)
def window_means_kernel(
    keys,  # [B, H, N, D]
    first,  # [B]
    last,  # [B]
    means,  # [B, H, windows, D]
    stride_b,
    stride_h,
    stride_t,
    num_tokens,  # N
    window,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_part, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_w = i_part // tl.cdiv(D, BLOCK_D)
    i_begin, count = tokens_in(first, last, i_b, i_w, num_tokens, window)
    if count == 0:
        return
    o_d = i_part % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_keys = keys + i_b * stride_b + i_h.to(tl.int64) * stride_h + i_begin * stride_t + o_d[None, :]
    b_sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i_t in tl.range(0, count, BLOCK_T, num_stages=4):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_keys = (o_t < count)[:, None] & m_d[None, :]
        b_sums += tl.load(p_keys + o_t[:, None].to(tl.int64) * stride_t, mask=m_keys, other=0.0)
    i_mean = (i_b * tl.num_programs(1) + i_h) * tl.cdiv(num_tokens, window) + i_w
    tl.store(means + i_mean * D + o_d, tl.sum(b_sums, 0) / count, mask=m_d)


@triton.jit(do_not_specialize=VARYING)
def first_centres_kernel(
    keys,  # [B, H, N, D]
    first,  # [B]
    last,  # [B]
    means,  # [B, H, windows, D]
    centres,  # [B, H, K, D]
    stride_b,
    stride_h,
    stride_t,
    num_tokens,  # N
    num_clusters,  # K
    window,
    cluster_size,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_part, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts = tl.cdiv(clusters_in(window, cluster_size), BLOCK_C)  # of a window
    i_w = i_part // parts
    i_row = i_b * tl.num_programs(1) + i_h
    i_begin, count = tokens_in(first, last, i_b, i_w, num_tokens, window)
    num_centres = clusters_in(count, cluster_size)
    if (count == 0) | (i_part % parts * BLOCK_C >= num_centres):
        return
    o_c = i_part % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_cd = (o_c < num_centres)[:, None] & m_d[None, :]
    o_t = i_begin + o_c.to(tl.int64) * count // num_centres  # evenly spaced
    p_keys = keys + i_b * stride_b + i_h.to(tl.int64) * stride_h
    b_keys = tl.load(p_keys + o_t[:, None] * stride_t + o_d[None, :], mask=m_cd, other=0.0)
    i_mean = i_row * tl.cdiv(num_tokens, window) + i_w
    b_mean = tl.load(means + i_mean * D + o_d, mask=m_d, other=0.0)
    b_centres = normalised(b_keys.to(tl.float32) - b_mean[None, :])
    o_k = i_row * num_clusters + i_w * clusters_in(window, cluster_size) + o_c
    p_centres = centres + o_k[:, None] * D + o_d[None, :]
    tl.store(p_centres, b_centres.to(centres.dtype.element_ty), mask=m_cd)


@triton.jit(do_not_specialize=VARYING)
def assign_labels_kernel(
    keys,  # [B, H, N, D]
    first,  # [B]
    last,  # [B]
    means,  # [B, H, windows, D]
    centres,  # [B, H, K, D]
    labels,  # [B, H, N]
    stride_b,
    stride_h,
    stride_t,
    num_tokens,  # N
    num_clusters,  # K
    window,
    cluster_size,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_part, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts = tl.cdiv(window, BLOCK_T)
    i_w = i_part // parts
    i_row = i_b * tl.num_programs(1) + i_h
    i_begin, count = tokens_in(first, last, i_b, i_w, num_tokens, window)
    if i_part % parts * BLOCK_T >= count:
        return
    num_centres = clusters_in(count, cluster_size)
    i_first = i_w * clusters_in(window, cluster_size)  # cluster
    o_t = i_part % parts * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_t < count
    m_d = o_d < D

    p_keys = keys + i_b * stride_b + i_h.to(tl.int64) * stride_h
    p_keys += (i_begin + o_t)[:, None] * stride_t + o_d[None, :]
    b_keys = tl.load(p_keys, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    i_mean = i_row * tl.cdiv(num_tokens, window) + i_w
    b_keys -= tl.load(means + i_mean * D + o_d, mask=m_d, other=0.0)[None, :]
    b_keys = b_keys.to(keys.dtype.element_ty)
    p_centres = centres + (i_row * num_clusters + i_first) * D + o_d[:, None]

    b_best = tl.full([BLOCK_T, BLOCK_C // 2], float("-inf"), tl.float32)  # of two columns
    b_where = tl.zeros([BLOCK_T, BLOCK_C // 2], tl.int32)  # its tile's start, + 1 if odd
    for i_c in range(0, num_centres, BLOCK_C):
        # Columns past the last centre repeat it: they cost no mask, and its label is theirs.
        o_k = tl.minimum(i_c + o_c, num_centres - 1)
        b_centres = tl.load(p_centres + o_k[None, :] * D, mask=m_d[:, None], other=0.0)
        b_dots = dot(b_keys, b_centres, tl.zeros([BLOCK_T, BLOCK_C], tl.float32))
        b_even, b_odd = tl.split(tl.reshape(b_dots, [BLOCK_T, BLOCK_C // 2, 2]))
        m_odd = b_odd > b_even
        b_top = tl.where(m_odd, b_odd, b_even)
        m_better = b_top > b_best
        b_best = tl.where(m_better, b_top, b_best)
        b_where = tl.where(m_better, tl.where(m_odd, i_c + 1, i_c), b_where)
    b_labels = tl.minimum(b_where + 2 * tl.arange(0, BLOCK_C // 2)[None, :], num_centres - 1)
    b_labels = tl.where(b_best == tl.max(b_best, 1)[:, None], b_labels, num_centres)
    b_label = tl.min(b_labels, 1)  # ties: the first
    tl.store(labels + i_row * num_tokens + i_begin + o_t, i_first + b_label, mask=m_t)


@triton.jit(do_not_specialize=VARYING)
def update_centres_kernel(
    keys,  # [B, H, N, D]
    first,  # [B]
    last,  # [B]
    means,  # [B, H, windows, D]
    labels,  # [B, H, N]
    members,  # [B, H, N], scratch: tokens of a window by block of clusters
    centres,  # [B, H, K, D]
    centroids,  # [B, H, K, D]
    sizes,  # [B, H, K]
    stride_b,
    stride_h,
    stride_t,
    num_tokens,  # N
    num_clusters,  # K
    window,
    cluster_size,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,  # labels read at a time
):
    i_part, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    per_window = clusters_in(window, cluster_size)
    parts = tl.cdiv(per_window, BLOCK_C)
    i_w = i_part // parts
    i_row = i_b * tl.num_programs(1) + i_h
    i_begin, count = tokens_in(first, last, i_b, i_w, num_tokens, window)
    i_lowest = i_w * per_window + i_part % parts * BLOCK_C  # cluster
    o_c = i_lowest + tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, BLOCK_D)
    o_l = tl.arange(0, BLOCK_L)
    m_d = o_d < D
    m_c = (o_c < (i_w + 1) * per_window) & (o_c < num_clusters)
    p_labels = labels + i_row * num_tokens + i_begin
    p_members = members + i_row * num_tokens + i_begin

    # The window's list of members holds those of lower clusters first: count them, then append.
    b_before = tl.zeros([BLOCK_L], tl.int32)
    for i_l in tl.range(0, count, BLOCK_L, num_stages=3):
        b_label = tl.load(p_labels + i_l + o_l, mask=i_l + o_l < count, other=i_lowest)
        b_before += (b_label < i_lowest).to(tl.int32)
    p_members += tl.sum(b_before, 0)
    num_members = tl.zeros([], tl.int32)
    for i_l in tl.range(0, count, BLOCK_L, num_stages=3):
        b_label = tl.load(p_labels + i_l + o_l, mask=i_l + o_l < count, other=-1)
        m_member = (b_label >= i_lowest) & (b_label < i_lowest + BLOCK_C)
        b_rank = tl.cumsum(m_member.to(tl.int32), 0)
        tl.store(p_members + num_members + b_rank - 1, i_l + o_l, mask=m_member)
        num_members += tl.sum(m_member.to(tl.int32), 0)
    tl.debug_barrier()  # other threads of the program wrote what is read now

    p_keys = keys + i_b * stride_b + i_h.to(tl.int64) * stride_h + i_begin * stride_t
    b_sums = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    b_sizes = tl.zeros([BLOCK_C, BLOCK_T], tl.int32)
    for i_t in range(0, num_members, BLOCK_T):
        m_t = i_t + tl.arange(0, BLOCK_T) < num_members
        b_token = tl.load(p_members + i_t + tl.arange(0, BLOCK_T), mask=m_t, other=0)
        b_label = tl.load(p_labels + b_token, mask=m_t, other=-1)
        p_token = p_keys + b_token[:, None].to(tl.int64) * stride_t + o_d[None, :]
        b_keys = tl.load(p_token, mask=m_t[:, None] & m_d[None, :], other=0.0)
        m_own = o_c[:, None] == b_label[None, :]
        b_sums = dot(tl.where(m_own, 1.0, 0.0).to(b_keys.dtype), b_keys, b_sums)
        b_sizes += m_own.to(tl.int32)

    b_size = tl.sum(b_sizes, 1)
    o_k = i_row * num_clusters + o_c
    o_cd = o_k[:, None] * D + o_d[None, :]
    m_cd = m_c[:, None] & m_d[None, :]
    b_centroids = b_sums / tl.maximum(b_size, 1)[:, None]
    tl.store(sizes + o_k, b_size, mask=m_c)
    tl.store(centroids + o_cd, b_centroids.to(centroids.dtype.element_ty), mask=m_cd)
    m_full = b_size > 0  # a centre without tokens stays where it is
    i_mean = i_row * tl.cdiv(num_tokens, window) + i_w
    b_mean = tl.load(means + i_mean * D + o_d, mask=m_d & (count > 0), other=0.0)
    b_centres = normalised(b_centroids - b_mean[None, :])
    m_cd &= m_full[:, None]
    tl.store(centres + o_cd, b_centres.to(centres.dtype.element_ty), mask=m_cd)


@on_its_device
def launch(
    keys: Tensor, first: Tensor, last: Tensor, cluster_size: int, window: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, dim = keys.shape
    window = min(window, max(tokens, 1))  # no row has more
    cluster_size = min(cluster_size, 2 * window + 1)  # from there on there is one cluster
    windows = triton.cdiv(tokens, window)
    per_window = num_clusters(window, cluster_size, window)
    total = num_clusters(tokens, cluster_size, window)

    labels = keys.new_full((batch, heads, tokens), -1, dtype=torch.int32)
    centroids = keys.new_empty(batch, heads, total, dim)
    sizes = labels.new_empty(batch, heads, total)
    members = torch.empty_like(labels)
    means = keys.new_empty(batch, heads, windows, dim, dtype=torch.float32)
    centres = torch.empty_like(centroids)

    block_d = triton.next_power_of_2(dim)
    strides = keys.stride()[:3]
    shape = *strides, tokens, total, window, cluster_size
    assign, update = config(dim, keys.dtype)

    def grid(of_window: int, block: int) -> tuple[int, int, int]:
        return windows * triton.cdiv(of_window, block), heads, batch

    window_means_kernel[grid(dim, 32)](
        keys,
        first,
        last,
        means,
        *strides,
        tokens,
        window,
        D=dim,
        BLOCK_D=32,
        BLOCK_T=128,
        num_warps=4,
        **COMPILE,
    )
    first_centres_kernel[grid(per_window, 16)](
        keys,
        first,
        last,
        means,
        centres,
        *shape,
        D=dim,
        BLOCK_D=block_d,
        BLOCK_C=16,
        num_warps=4,
        **COMPILE,
    )
    for _ in range(iterations):
        assign_labels_kernel[grid(window, assign["BLOCK_T"])](
            keys,
            first,
            last,
            means,
            centres,
            labels,
            *shape,
            D=dim,
            BLOCK_D=block_d,
            **assign,
            **COMPILE,
        )
        update_centres_kernel[grid(per_window, update["BLOCK_C"])](
            keys,
            first,
            last,
            means,
            labels,
            members,
            centres,
            centroids,
            sizes,
            *shape,
            D=dim,
            BLOCK_D=block_d,
            BLOCK_L=2048,
            **update,
            **COMPILE,
        )
    return labels, centroids, sizes
