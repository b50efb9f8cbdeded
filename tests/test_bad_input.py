"""Bad input to an op: one clear error that names op and argument, and nothing is written."""

import pytest
import torch

from kvcomp import ops

B, HQ, HKV, T, D = 2, 8, 2, 40, 64


def attention(**changes):
    """A good call of decode_attention, with some arguments replaced."""
    args = {
        "q": torch.randn(B, HQ, D),
        "k": torch.randn(B, HKV, T, D),
        "v": torch.randn(B, HKV, T, D),
        "seq_lens": torch.full((B,), T, dtype=torch.int32),
        **changes,
    }
    return ops.decode_attention(**args)


def paged(page_ids, page_size=16, **changes):
    lens = torch.full((B,), 16, dtype=torch.int32)
    return attention(page_ids=page_ids, page_size=page_size, **{"seq_lens": lens, **changes})


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def merge(**changes):
    args = {"out_a": torch.randn(B, HQ, D), "lse_a": torch.randn(B, HQ)}
    args |= {"out_b": torch.randn(B, HQ, D), "lse_b": torch.randn(B, HQ), **changes}
    return ops.merge_states(**args)


def scores(page_size=16, num_groups=1, reduction="max", **changes):
    args = {"logits": torch.randn(B, HQ, T), "lse": torch.randn(B, HQ), "seq_lens": ints(T, T)}
    args |= changes
    return ops.page_scores(*args.values(), page_size, num_groups=num_groups, reduction=reduction)


def select(page_size=16, num_pages=2, **changes):
    counts = {name: changes.pop(name) for name in ("num_recent", "num_sink") if name in changes}
    args = {"scores": torch.rand(B, 1, 3), "seq_lens": ints(T, T), **changes}
    return ops.select_pages(*args.values(), page_size, num_pages, **counts)


def hits(threshold=0.01, **changes):
    args = {"logits": torch.randn(B, HQ, T), "lse": torch.randn(B, HQ), "seq_lens": ints(T, T)}
    args |= {"hits": torch.zeros(B, HKV, 2, dtype=torch.int32), **changes}
    return ops.attention_hits(*args.values(), threshold)


def recurrence(first_step=7, **changes):
    args = {"hits": torch.zeros(B, 3, HKV, 2, dtype=torch.int32)}
    args |= {name: torch.zeros(B, HKV, T, dtype=torch.int32) for name in ("last_hit", "longest")}
    args |= {"seq_lens": ints(T, T), "born": ints(3, 3), **changes}
    return ops.recurrence_update(*args.values(), first_step)


def victims(num_victims=10, num_recent=5, **changes):
    args = {"scores": torch.rand(B, HKV, T)}
    args |= {"positions": torch.arange(T, dtype=torch.int32).expand(B, HKV, T)}
    args |= {"seq_lens": ints(T, T), "kept_lens": ints(T - 10, T), **changes}
    return ops.select_victims(*args.values(), num_victims, num_recent=num_recent)


def compact(**changes):
    args = {"k": torch.randn(B, HKV, T, D), "v": torch.randn(B, HKV, T, D)}
    args |= {"state": [torch.zeros(B, HKV, T, dtype=torch.int32), torch.zeros(B, HKV, T)]}
    args |= {"victims": gone([1, 5, -1], [0, 39, -1]), "seq_lens": ints(T, T), **changes}
    return ops.compact_kv(*args.values())


def gone(*units):
    """Victims [B, U, V]: in row 0 these, in row 1 none."""
    victims = torch.full((B, len(units), len(units[0])), -1, dtype=torch.int32)
    victims[0] = torch.tensor(units)
    return victims


def rotate(**changes):
    args = {"k": torch.randn(B, HKV, T, D), "shift": torch.tensor([-3, 5])}
    args |= {"inv_freq": torch.rand(D // 2), **changes}
    return ops.rotate_keys(*args.values())


U, R, K = 6, 50, 12  # units, rows of the pool, wanted rows


def cluster(cluster_size=4, window=16, iterations=2, **changes):
    args = {"keys": torch.randn(B, HKV, T, D), "first": ints(0, 3), "last": ints(T, 3), **changes}
    numbers = {"cluster_size": cluster_size, "window": window, "iterations": iterations}
    return ops.kmeans(*args.values(), **numbers)


def similarity(**changes):
    args = {"q": torch.randn(B, HQ, D), "previous": torch.randn(B, HQ, D), **changes}
    return ops.query_similarity(*args.values())


def bounds():
    """Unit u holds tokens [5 u, 5 u + 5)."""
    return torch.arange(0, 5 * U + 1, 5, dtype=torch.int32).expand(B, HKV, U + 1).clone()


def cut(shortest=2, longest=8, local=4, **changes):
    args = {"similarity": torch.zeros(B), "lengths": ints(14, 19), "starts": bounds()}
    args |= {"num_units": ints(2, 3), "num_indexed": ints(1, 3), **changes}
    numbers = {"shortest": shortest, "longest": longest, "local": local}
    return ops.segment_boundaries(*args.values(), cut_below=0.5, retrieve_below=0.5, **numbers)


def pool(*rows, dim=D, **options):
    return [torch.randn(B, HKV, n, 2, dim, **options) for n in rows]


def held():
    """Slot t holds row t."""
    return torch.arange(T, dtype=torch.int32).expand(B, HKV, T).clone()


def store(**changes):
    args = {"k": torch.randn(B, HKV, T, D), "v": torch.randn(B, HKV, T, D)}
    args |= {"slot_rows": held(), "seq_lens": ints(T, T), "starts": bounds()}
    args |= {"num_units": ints(3, 0), "closed": ints(5, 0), "pool": pool(R - 9, 9)}
    args |= {"centroids": torch.zeros(B, HKV, U, D), **changes}
    return ops.store_segments(*args.values())


def unit_worth(**changes):
    args = {"q": torch.randn(B, HQ, D), "centroids": torch.randn(B, HKV, U, D)}
    args |= {"starts": bounds(), "num_indexed": ints(U, 0), "active": ints(1, 1), **changes}
    return ops.unit_scores(*args.values())


def best_units(budget=9, **changes):
    args = {"scores": torch.rand(B, HKV, U), "starts": bounds(), "num_indexed": ints(U, 0)}
    args |= {"active": ints(1, 1), **changes}
    return ops.select_units(*args.values(), budget)


def want(*heads):
    """Wanted rows [B, H, K]: in row 0 these of each head."""
    rows = torch.full((B, HKV, K), -1, dtype=torch.int32)
    for head, listed in enumerate(heads):
        rows[0, head, : len(listed)] = ints(*listed)
    return rows


def fetch(num_sinks=2, **changes):
    args = {"k": torch.randn(B, HKV, T, D), "v": torch.randn(B, HKV, T, D)}
    args |= {"slot_rows": held(), "seq_lens": ints(30, T), "rows": want([3, 7, 24], [2, 8, 9])}
    args |= {"first_local": ints(25, 1), "active": ints(1, 0), "pool": pool(R - 9, 9), **changes}
    return ops.fetch_rows(*args.values(), num_sinks=num_sinks)


BAD = [
    (lambda: attention(k=torch.randn(B, HKV, T, D).half()), "decode_attention.*'k'.*float32"),
    (lambda: attention(q=torch.randn(B, HQ, D).double()), "'q'.*float64"),
    (lambda: attention(q=torch.randn(B, D, HQ).transpose(1, 2)), "'q'.*contiguous"),
    (lambda: attention(k=torch.randn(B, HKV, D, T).transpose(2, 3)), "'k'.*contiguous"),
    (lambda: attention(q=torch.randn(B, 7, D)), "'q'.*multiple of Hkv=2.*7"),
    (lambda: attention(v=torch.randn(B, HKV, T - 1, D)), "'v'.*T=40.*39"),
    (lambda: attention(k=torch.randn(B, HKV, D)), "'k'"),
    (lambda: attention(seq_lens=ints(T, T + 1)), "'seq_lens'.*T=40.*41 in row 1"),
    (lambda: attention(seq_lens=ints(-1, 3)), "'seq_lens'.*-1 in row 0"),
    (lambda: attention(seq_lens=torch.tensor([T, T])), "'seq_lens'.*int32"),
    (lambda: attention(seq_lens=ints(T)), "'seq_lens'.*B=2.*1"),
    (lambda: attention(logits=torch.empty(B, HQ, T - 1)), "'logits'.*40"),
    (lambda: attention(logits=torch.empty(B, HQ, T).half()), "'logits'.*float32"),
    (lambda: attention(k=torch.randn(B, HKV, T, D, device="meta")), "'k'.*(meta|device)"),
    (lambda: attention(q=torch.randn(B, D)), "'q'.*B=|'q'.*shape"),
    (lambda: attention(q=torch.randn(B, HQ, 40), k=torch.randn(B, HKV, T, 40)), "'[qv]'.*40"),
    (
        lambda: attention(
            q=torch.randn(B, HQ, 48), k=torch.randn(B, HKV, T, 48), v=torch.randn(B, HKV, T, 48)
        ),
        "'q'.*head size.*48|'q'.*32, 64.*48",
    ),
    (
        lambda: attention(
            q=torch.randn(0, HQ, D),
            k=torch.randn(0, HKV, T, D),
            v=torch.randn(0, HKV, T, D),
            seq_lens=ints(),
        ),
        "'q'.*at least one sequence",
    ),
    (lambda: paged(ints(0, 1).view(1, 1, 2).expand(B, 1, 2) + 9), "'page_ids'.*T=40.*row 0"),
    (lambda: paged(torch.full((B, 1, 2), -2, dtype=torch.int32)), "'page_ids'.*-2"),
    (lambda: paged(torch.zeros(B, 1, 0, dtype=torch.int32)), "'seq_lens'.*page_size=0.*16"),
    (lambda: paged(torch.zeros(B, 3, 2, dtype=torch.int32)), "'page_ids'"),
    (lambda: paged(torch.zeros(B, 1, 2, dtype=torch.int64)), "'page_ids'.*int32"),
    (lambda: paged(torch.zeros(B, 1, 2, dtype=torch.int32), page_size=0), "'page_size'.*0"),
    (
        lambda: paged(torch.zeros(B, 1, 2, dtype=torch.int32), seq_lens=ints(33, 1)),
        "'seq_lens'.*32.*33",
    ),
    (lambda: merge(lse_a=torch.randn(B, 7)), "merge_states.*'lse_a'.*Hq=8.*7"),
    (lambda: merge(out_b=torch.randn(B, HQ, D).half()), "'out_b'"),
    (lambda: merge(lse_b=torch.randn(B, HQ).double()), "'lse_b'.*float32"),
    (lambda: scores(lse=torch.randn(B, 7)), "page_scores.*'lse'"),
    (lambda: scores(page_size=0), "'page_size'"),
    (lambda: scores(num_groups=3), "'num_groups'"),
    (lambda: scores(num_groups=-1), "'num_groups'"),
    (lambda: scores(reduction="mean"), "'reduction'.*mean"),
    (lambda: scores(seq_lens=ints(T, 41)), "'seq_lens'.*41 in row 1"),
    (lambda: select(num_recent=0), "select_pages.*'num_recent'"),
    (lambda: select(num_recent=2, num_sink=1), "'num_pages'|'num_sink'|'num_recent'"),
    (lambda: select(num_sink=-1), "'num_sink'"),
    (lambda: select(seq_lens=ints(T, 49)), "'seq_lens'.*49"),
    (lambda: select(num_pages=0), "'num_(pages|recent)'"),
    (lambda: select(scores=torch.rand(B, 3)), "'scores'"),
    (lambda: hits(threshold=0.0), "attention_hits.*'threshold'.*0.0"),
    (lambda: hits(threshold=1.0), "'threshold'.*1.0"),
    (lambda: hits(threshold=float("nan")), "'threshold'.*nan"),
    (lambda: hits(logits=torch.randn(B, HQ, T).half()), "attention_hits.*'logits'.*float32"),
    (lambda: hits(logits=torch.randn(B, T, HQ).transpose(1, 2)), "'logits'.*contiguous"),
    (lambda: hits(lse=torch.randn(B, 7)), "'lse'.*Hq=8.*7"),
    (lambda: hits(seq_lens=ints(T, 41)), "'seq_lens'.*N=40.*41 in row 1"),
    (lambda: hits(hits=torch.zeros(B, HKV, 1, dtype=torch.int32)), "'hits'.*N=40.*1"),
    (lambda: hits(hits=torch.zeros(B, HKV, 2)), "'hits'.*int32"),
    (lambda: hits(hits=torch.empty(B, 1, 2**25, dtype=torch.int32)), "'hits'.*tokens.*1073741824"),
    (lambda: hits(hits=torch.zeros(B, 3, 2, dtype=torch.int32)), "'hits'.*divisor of Hq=8.*3"),
    (lambda: hits(hits=torch.zeros(B, 0, 2, dtype=torch.int32)), "'hits'.*divisor of Hq=8.*0"),
    (
        lambda: hits(hits=torch.zeros(B, HKV, 3, dtype=torch.int32)[..., :2]),
        "'hits'.*last two dimensions contiguous.*3.*2",
    ),
    (lambda: recurrence(first_step=-1), "recurrence_update.*'first_step'.*-1"),
    (lambda: recurrence(first_step=2**31 - 8), "'first_step'.*2147483640"),
    (lambda: recurrence(born=ints(3, -1)), "'born'.*-1 in row 1"),
    (lambda: recurrence(born=ints(3)), "'born'.*B=2.*1"),
    (lambda: recurrence(seq_lens=ints(41, T)), "'seq_lens'.*N=40.*41 in row 0"),
    (lambda: recurrence(hits=torch.zeros(B, 33, HKV, 2, dtype=torch.int32)), "'hits'.*32.*33"),
    (lambda: recurrence(hits=torch.zeros(B, 0, HKV, 2, dtype=torch.int32)), "'hits'.*32.*0"),
    (lambda: recurrence(hits=torch.zeros(B, 3, HKV, 1, dtype=torch.int32)), "'hits'.*N=40.*1"),
    (lambda: recurrence(hits=torch.zeros(B, 3, HKV, 2)), "'hits'.*int32"),
    (lambda: recurrence(last_hit=torch.zeros(B, HKV, T)), "'last_hit'.*int32"),
    (
        lambda: recurrence(last_hit=torch.zeros(B, T, HKV, dtype=torch.int32).transpose(1, 2)),
        "'last_hit'.*contiguous",
    ),
    (lambda: recurrence(longest=torch.zeros(B, HKV, 39, dtype=torch.int32)), "'longest'.*40.*39"),
    (lambda: victims(scores=torch.rand(T)), "select_victims.*'scores'.*B, U, N.*40"),
    (lambda: victims(num_victims=-1), "select_victims.*'num_victims'.*-1"),
    (lambda: victims(num_victims=9), "'num_victims'.*10 victims in row 0.*9"),
    (lambda: victims(num_recent=-1), "'num_recent'.*-1"),
    (lambda: victims(num_recent=31), "'num_recent'.*kept_lens=30 in row 0.*31"),
    (lambda: victims(kept_lens=ints(T, -1)), "'kept_lens'.*-1 in row 1"),
    (lambda: victims(kept_lens=ints(T)), "'kept_lens'.*B=2.*1"),
    (lambda: victims(seq_lens=ints(T, 41)), "'seq_lens'.*N=40.*41 in row 1"),
    (lambda: victims(scores=torch.rand(B, HKV, T).half()), "'scores'.*float32"),
    (lambda: victims(scores=torch.rand(B, T, HKV).transpose(1, 2)), "'scores'.*contiguous"),
    (lambda: victims(positions=torch.zeros(B, HKV, T)), "'positions'.*int32"),
    (lambda: victims(positions=torch.zeros(B, 1, T, dtype=torch.int32)), "'positions'.*U=2.*1"),
    (lambda: compact(k=torch.randn(B, HKV, T, D).double()), "compact_kv.*'k'.*float64"),
    (lambda: compact(v=torch.randn(B, HKV, T, D).half()), "'v'.*dtype of 'k'"),
    (lambda: compact(v=torch.randn(B, HKV, T + 1, D)), "'v'.*T=40.*41"),
    (lambda: compact(k=torch.randn(B, HKV, D, T).transpose(2, 3)), "'k'.*contiguous"),
    (lambda: compact(state=[torch.zeros(B, HKV, T, dtype=torch.int64)]), "'state.0.'.*int64"),
    (
        lambda: compact(state=[torch.zeros(B, HKV, T), torch.zeros(B, HKV, 39)]),
        "'state.1.'.*40 tokens.*39",
    ),
    (lambda: compact(state=[torch.zeros(B, 1, T)]), "'state.0.'.*U=2.*1"),
    (lambda: compact(state=[torch.zeros(B, HKV, T)] * 9), "'state'.*at most 8.*9"),
    (lambda: compact(state=[torch.zeros(B, T, HKV).transpose(1, 2)]), "'state.0.'.*contiguous"),
    (lambda: compact(state=[torch.zeros(B, HKV, T, device="meta")]), "'state.0.'"),
    (lambda: compact(seq_lens=ints(T, 41)), "'seq_lens'.*T=40.*41 in row 1"),
    (lambda: compact(victims=gone([1], [2], [3])), "'victims'.*1 or H=2.*3"),
    (lambda: compact(victims=gone([1, 5], [0, 40])), "'victims'.*40 in row 0, unit 1"),
    (lambda: compact(victims=gone([1, 5], [5, 1])), "'victims'.*1 in row 0, unit 1"),
    (lambda: compact(victims=gone([5, 5], [5, 6])), "'victims'.*5 in row 0, unit 0"),
    (lambda: compact(victims=gone([1, 5], [-2, 1])), "'victims'.*-2 in row 0, unit 1"),
    (lambda: compact(victims=gone([1, -1], [-1, 1])), "'victims'.*1 in row 0, unit 1"),
    (lambda: compact(victims=gone([1, 2], [3, -1])), "'victims'.*2 as in unit 0.*1 in row 0"),
    (lambda: compact(victims=gone([1], [2]).long()), "'victims'.*int32"),
    (lambda: rotate(shift=torch.tensor([1.0, 2.0])), "rotate_keys.*'shift'.*float32"),
    (lambda: rotate(shift=torch.tensor(1)), "'shift'.*one dimension"),
    (lambda: rotate(inv_freq=torch.rand(B, 32)), "'inv_freq'.*one dimension.*2, 32"),
    (lambda: rotate(shift=torch.tensor([1])), "'shift'.*B=2.*1"),
    (lambda: rotate(inv_freq=torch.rand(33)), "'inv_freq'.*D / 2 = 32.*33"),
    (lambda: rotate(inv_freq=torch.rand(0)), "'inv_freq'.*1 to.*0"),
    (lambda: rotate(k=torch.randn(B, HKV, D, T).transpose(2, 3)), "'k'.*contiguous"),
    (lambda: rotate(k=torch.randn(B, HKV, T, D).double()), "'k'.*float64"),
    (lambda: cluster(keys=torch.randn(B, HKV, T, D).double()), "kmeans.*'keys'.*float64"),
    (lambda: cluster(keys=torch.randn(B, HKV, D, T).transpose(2, 3)), "'keys'.*contiguous"),
    (lambda: cluster(keys=torch.randn(B, HKV, T, 40)), "'keys'.*multiple of 16.*40"),
    (lambda: cluster(keys=torch.randn(B, HKV, T, 272)), "'keys'.*at most 256.*272"),
    (lambda: cluster(keys=torch.randn(B, 0, T, D)), "'keys'.*at least one head"),
    (lambda: cluster(keys=torch.randn(0, 1, T, D), first=ints(), last=ints()), "one sequence"),
    (lambda: cluster(first=ints(0)), "'first'.*B=2.*1"),
    (lambda: cluster(first=ints(0, 4)), "'first'.*last=3.*4 in row 1"),
    (lambda: cluster(first=ints(-1, 0)), "'first'.*-1 in row 0"),
    (lambda: cluster(last=torch.tensor([T, T])), "'last'.*int32"),
    (lambda: cluster(last=ints(T, 41)), "'last'.*N=40.*41 in row 1"),
    (lambda: cluster(cluster_size=0), "'cluster_size'.*0"),
    (lambda: cluster(window=-1), "'window'.*-1"),
    (lambda: cluster(iterations=0), "'iterations'.*0"),
    (lambda: similarity(q=torch.randn(B, HQ, D).long()), "query_similarity.*'q'.*int64"),
    (lambda: similarity(q=torch.randn(B, D, HQ).transpose(1, 2)), "'q'.*contiguous"),
    (lambda: similarity(q=torch.randn(B, 0, D), previous=torch.randn(B, 0, D)), "'q'.*one head"),
    (lambda: similarity(q=torch.randn(B, 2, 8), previous=torch.randn(B, 2, 8)), "'q'.*16.*8"),
    (lambda: similarity(previous=torch.randn(B, HQ, D).half()), "'previous'.*dtype of 'q'"),
    (lambda: similarity(previous=torch.randn(B, 7, D)), "'previous'.*Hq=8.*7"),
    (lambda: similarity(previous=torch.randn(HQ, B, D).transpose(0, 1)), "'previous'.*contig"),
    (lambda: similarity(previous=torch.randn(B, HQ, D, device="meta")), "'previous'"),
    (lambda: cut(similarity=torch.zeros(B).double()), "segment_bound.*'similarity'.*float64"),
    (lambda: cut(similarity=torch.zeros(3)), "'starts'.*B=3.*2"),
    (lambda: cut(lengths=ints(14)), "'lengths'.*B=2.*1"),
    (lambda: cut(lengths=ints(14, 14)), "'lengths'.*starts.num_units.=15.*14 in row 1"),
    (lambda: cut(starts=bounds().long()), "'starts'.*int32"),
    (lambda: cut(starts=bounds().transpose(1, 2)), "'starts'.*contiguous"),
    (lambda: cut(starts=bounds()[:, :, :1]), "'starts'.*room.*1"),
    (lambda: cut(starts=bounds()[:, :0]), "'starts'.*one head"),
    (lambda: cut(starts=bounds() - 11), "'starts'.*ascending.*-6 in row 0"),
    (lambda: cut(starts=-bounds()), "'starts'.*ascending.*in row 0"),
    (lambda: cut(num_units=ints(2, U)), "'num_units'.*U=6.*6 in row 1"),
    (lambda: cut(num_units=ints(-1, 3)), "'num_units'.*-1 in row 0"),
    (lambda: cut(num_indexed=ints(3, 3)), "'num_indexed'.*num_units=2.*3 in row 0"),
    (lambda: cut(num_indexed=ints(1, -2)), "'num_indexed'.*-2 in row 1"),
    (lambda: cut(num_indexed=torch.zeros(B)), "'num_indexed'.*int32"),
    (lambda: cut(shortest=0), "'shortest'.*0"),
    (lambda: cut(longest=1), "'longest'.*at least 2.*1"),
    (lambda: cut(local=-1), "'local'.*-1"),
    (lambda: store(k=torch.randn(B, HKV, T, D).double()), "store_segments.*'k'.*float64"),
    (lambda: store(k=torch.randn(B, HKV, D, T).transpose(2, 3)), "'k'.*contiguous"),
    (lambda: store(v=torch.randn(B, HKV, T, D).half()), "'v'.*dtype of 'k'"),
    (lambda: store(v=torch.randn(B, HKV, T + 1, D)), "'v'.*T=40.*41"),
    (lambda: store(slot_rows=held().long()), "'slot_rows'.*int32"),
    (lambda: store(slot_rows=held()[:, :1]), "'slot_rows'.*H=2.*1"),
    (lambda: store(slot_rows=held() + 11), "'slot_rows'.*5 rows.*4 in row 0, head 0"),
    (lambda: store(seq_lens=ints(T, 41)), "'seq_lens'.*T=40.*41 in row 1"),
    (lambda: store(seq_lens=ints(13, T)), "'slot_rows'.*5 rows.*3 in row 0, head 0"),
    (lambda: store(slot_rows=held()[:, :, :20]), "'seq_lens'.*T=20.*40 in row 0"),
    (lambda: store(starts=bounds()[:, :, :U]), "'starts'.*7.*6"),
    (lambda: store(starts=bounds() * 2), "'closed'.*10 tokens.*5 in row 0, head 0"),
    (lambda: store(starts=bounds() + 38), "'starts'.*50 rows.*48 to 53 in row 0, head 0"),
    (lambda: store(starts=bounds() - 11), "'starts'.*50 rows.*-1 to 4 in row 0"),
    (lambda: store(num_units=ints(7, 0)), "'num_units'.*U=6.*7 in row 0"),
    (lambda: store(num_units=ints(0, 0)), "'num_units'.*0 in row 0"),
    (lambda: store(num_units=ints(3)), "'num_units'.*B=2.*1"),
    (lambda: store(closed=ints(5, -1)), "'closed'.*R=50.*-1 in row 1"),
    (lambda: store(closed=ints(4, 0)), "'closed'.*5 tokens.*4 in row 0"),
    (lambda: store(pool=pool(R)[0]), "'pool'.*list.*Tensor"),
    (lambda: store(pool=[]), "'pool'.*1 to 32.*0"),
    (lambda: store(pool=pool(*[2] * 33)), "'pool'.*1 to 32.*33"),
    (lambda: store(pool=pool(R, dim=32)), "'pool.0.'.*D=64.*32"),
    (lambda: store(pool=[*pool(R), *pool(9, dtype=torch.half)]), "'pool.1.'.*dtype of 'k'"),
    (lambda: store(pool=[pool(2 * R)[0][:, :, ::2]]), "'pool.0.'.*contiguous"),
    (lambda: store(pool=[None]), "'pool.0.'.*NoneType"),
    (lambda: store(centroids=torch.zeros(B, HKV, U, D).half()), "'centroids'.*dtype of 'k'"),
    (lambda: store(centroids=torch.zeros(B, HKV, U, 32)), "'centroids'.*D=64.*32"),
    (
        lambda: store(centroids=torch.zeros(B, U, HKV, D).transpose(1, 2)),
        "'centroids'.*last two dimensions contiguous",
    ),
    (lambda: unit_worth(q=torch.randn(B, HQ, D).double()), "unit_scores.*'q'.*float64"),
    (lambda: unit_worth(q=torch.randn(B, 7, D)), "'q'.*multiple of Hkv=2.*7"),
    (lambda: unit_worth(q=torch.randn(B, HQ, D)[..., ::2]), "'q'.*contiguous"),
    (lambda: unit_worth(centroids=torch.randn(B, HKV, U, D).half()), "'centroids'.*dtype of 'q'"),
    (lambda: unit_worth(centroids=torch.randn(B, HKV, U, 32)), "'centroids'.*D=64.*32"),
    (
        lambda: unit_worth(centroids=torch.randn(B, U, HKV, D).transpose(1, 2)),
        "'centroids'.*last two dimensions contiguous",
    ),
    (lambda: unit_worth(starts=bounds()[:, :, 1:]), "'starts'.*7.*6"),
    (lambda: unit_worth(starts=bounds().float()), "'starts'.*int32"),
    (lambda: unit_worth(num_indexed=ints(7, 0)), "'num_indexed'.*U=6.*7 in row 0"),
    (lambda: unit_worth(num_indexed=ints(0, -1)), "'num_indexed'.*-1 in row 1"),
    (lambda: unit_worth(active=ints(1)), "'active'.*B=2.*1"),
    (lambda: unit_worth(active=torch.tensor([True, False])), "'active'.*int32"),
    (lambda: best_units(scores=torch.rand(B, HKV, U).half()), "select_units.*'scores'.*float32"),
    (lambda: best_units(scores=torch.rand(B, U, HKV).transpose(1, 2)), "'scores'.*contiguous"),
    (lambda: best_units(starts=bounds()[:, :1]), "'starts'.*H=2.*1"),
    (lambda: best_units(starts=bounds().flip(-1)), "'starts'.*25 in row 0, head 0, unit 1"),
    (lambda: best_units(starts=bounds() - 1), "'starts'.*-1 in row 0, head 0, unit 0"),
    (lambda: best_units(num_indexed=ints(7, 0)), "'num_indexed'.*U=6.*7 in row 0"),
    (lambda: best_units(num_indexed=torch.tensor([1, 1])), "'num_indexed'.*int32"),
    (lambda: best_units(active=ints(1, 1, 1)), "'active'.*B=2.*3"),
    (lambda: best_units(budget=0), "'budget'.*0"),
    (lambda: best_units(budget=-5), "'budget'.*-5"),
    (lambda: fetch(k=torch.randn(B, HKV, T, D).double()), "fetch_rows.*'k'.*float64"),
    (lambda: fetch(v=torch.randn(B, HKV, T, D).half()), "'v'.*dtype of 'k'"),
    (lambda: fetch(v=torch.randn(B, HKV, D, T).transpose(2, 3)), "'v'.*contiguous"),
    (lambda: fetch(slot_rows=held().long()), "'slot_rows'.*int32"),
    (lambda: fetch(slot_rows=held()[:, :, :30]), "'seq_lens'.*T=30.*40 in row 1"),
    (lambda: fetch(seq_lens=ints(41, T)), "'seq_lens'.*T=40.*41 in row 0"),
    (lambda: fetch(rows=want([3], [2]).long()), "'rows'.*int32"),
    (lambda: fetch(rows=want([3], [2])[..., ::2]), "'rows'.*contiguous"),
    (lambda: fetch(rows=want([3, 7], [2, 1])), "'rows'.*2, 25.*1 in row 0, head 1"),
    (lambda: fetch(rows=want([3, 7], [2, 25])), "'rows'.*2, 25.*25 in row 0, head 1"),
    (lambda: fetch(rows=want([3, 3], [2, 4])), "'rows'.*3 in row 0, head 0"),
    (lambda: fetch(rows=want([3, -1, 4], [2, 4])), "'rows'.*4 in row 0, head 0"),
    (lambda: fetch(rows=want([3, -2], [2, 4])), "'rows'.*-2 in row 0, head 0"),
    (lambda: fetch(rows=want([3], [2, 4])), "'rows'.*in every head, 8.*9 in row 0, head 1"),
    (lambda: fetch(pool=pool(20)), "'first_local'.*20.*25 in row 0"),
    (lambda: fetch(first_local=ints(-1, 0)), "'first_local'.*50.*-1 in row 0"),
    (
        lambda: fetch(
            slot_rows=held() + 20, seq_lens=ints(T, T), rows=want(range(2, 14), range(2, 14))
        ),
        "'k'.*room for 47.*in row 0, head 0.*40",
    ),
    (lambda: fetch(first_local=ints(25)), "'first_local'.*B=2.*1"),
    (lambda: fetch(active=torch.ones(B)), "'active'.*int32"),
    (lambda: fetch(pool=pool(R, dtype=torch.half)), "'pool.0.'.*dtype of 'k'"),
    (lambda: fetch(pool=tuple(pool(R))), "'pool'.*list.*tuple"),
    (lambda: fetch(pool=pool(R, device="meta")), "'pool.0.'"),
    (lambda: fetch(num_sinks=-1), "'num_sinks'.*-1"),
]


@pytest.mark.parametrize("call, what", BAD)
def test_bad_input(call, what):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=what):
        call()


def test_good_input_is_good():
    """The table above changes one thing at a time of calls that work."""
    attention()
    paged(torch.zeros(B, 1, 2, dtype=torch.int32))
    merge()
    scores()
    select()
    hits()
    recurrence()
    victims()
    compact()
    rotate()
    cluster()
    similarity()
    cut()
    store()
    unit_worth()
    best_units()
    fetch()


def test_nothing_is_written_before_the_checks_pass():
    logits = torch.full((B, HQ, T), 7.0)
    with pytest.raises(ValueError):
        attention(seq_lens=ints(T, T + 1), logits=logits)
    assert (logits == 7).all()


def test_no_token_moves_before_the_checks_pass():
    """The first row and unit are good, so that a check on the way would come too late."""
    k, v, state = torch.randn(B, HKV, T, D), torch.randn(B, HKV, T, D), torch.rand(B, HKV, T)
    before = [tensor.clone() for tensor in (k, v, state)]
    for bad in (gone([1, 5], [0, 40]), gone([1, 2], [3, -1])):
        with pytest.raises(ValueError):
            compact(k=k, v=v, state=[state], victims=bad)
    with pytest.raises(ValueError):
        compact(k=k, v=v, state=[state, torch.zeros(B, HKV, 3)])
    assert all(map(torch.equal, (k, v, state), before))


def test_no_segment_is_cut_before_the_checks_pass():
    """The first row is good, and would be closed and let units go."""
    starts, num_units, num_indexed = bounds(), ints(2, 3), ints(0, 3)
    before = [tensor.clone() for tensor in (starts, num_units, num_indexed)]
    with pytest.raises(ValueError):
        cut(starts=starts, num_units=num_units, num_indexed=num_indexed, lengths=ints(14, 3))
    assert all(map(torch.equal, (starts, num_units, num_indexed), before))


def test_no_segment_is_stored_before_the_checks_pass():
    """The first head is good."""
    blocks, centroids, slot_rows = pool(R - 9, 9), torch.zeros(B, HKV, U, D), held()
    before = [tensor.clone() for tensor in (*blocks, centroids)]
    slot_rows[0, 1, 12] = 0
    with pytest.raises(ValueError):
        store(pool=blocks, centroids=centroids, slot_rows=slot_rows)
    assert all(map(torch.equal, (*blocks, centroids), before))


def test_no_row_is_fetched_before_the_checks_pass():
    """The first head is good."""
    k, v, slot_rows, lens = (
        torch.randn(B, HKV, T, D),
        torch.randn(B, HKV, T, D),
        held(),
        ints(30, T),
    )
    before = [tensor.clone() for tensor in (k, v, slot_rows, lens)]
    for bad in (want([3, 7], [2, 1]), want([3], [2, 4])):
        with pytest.raises(ValueError):
            fetch(k=k, v=v, slot_rows=slot_rows, seq_lens=lens, rows=bad)
    assert all(map(torch.equal, (k, v, slot_rows, lens), before))


def test_the_queries_stay_before_the_checks_pass():
    previous = torch.randn(B, HQ, D)
    before = previous.clone()
    with pytest.raises(ValueError):
        similarity(previous=previous, q=torch.randn(B, HQ, D)[:1])
    assert torch.equal(previous, before)
