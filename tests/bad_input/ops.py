"""Other ops: a wrong shape, dtype, device or stride of a tensor, a number out of range."""

import torch

from bad_input import Bad
from bad_input.op_calls import (
    HKV,
    HQ,
    B,
    D,
    R,
    T,
    U,
    append_rows,
    bounds,
    compact_kv,
    fetch_rows,
    gone,
    held,
    ints,
    linear_rows,
    merge_states,
    norm_rows,
    pool,
    quantize_rows,
    recurrence_update,
    rotate_keys,
    rotate_rows,
    store_segments,
    store_slots,
    want,
)


def shared_pools(start):
    """Pools in one piece of memory, those of V from `start` numbers on."""
    cache = torch.zeros(64 * D * 5)
    shape, strides = (4, HKV, 8, D), (64 * D, 4 * D, 8 * D, 1)
    parts = (cache.as_strided(shape, strides, first) for first in (0, start))
    return store_slots(**dict(zip(("k_pool", "v_pool"), parts, strict=True)))


ROWS = [
    Bad(lambda: quantize_rows(words=torch.zeros(B, HKV, 3)), "'words'.*int32.*float32", TypeError),
    Bad(lambda: quantize_rows(k_codes=torch.zeros(B, HKV, 3, D)), "'k_codes'.*int8", TypeError),
    Bad(lambda: quantize_rows(v=torch.randn(B, HKV, 4, D)), "'v'.*T=3.*4"),
    Bad(
        lambda: quantize_rows(
            turn=True,
            **{name: torch.randn(B, HKV, 3, 48) for name in "kv"},
            **{f"{name}_codes": torch.zeros(B, HKV, 3, 48, dtype=torch.int8) for name in "kv"},
        ),
        "'turn'.*power of two.*48",
    ),
    Bad(lambda: store_slots(slot_mapping=torch.tensor([9, -1, 32])), "P=32.*32 in row 2"),
    Bad(lambda: store_slots(slot_mapping=ints(9, -1, 3)), "'slot_mapping'.*int64", TypeError),
    Bad(lambda: store_slots(slot_mapping=torch.tensor([9, 3])), "'slot_mapping'.*N=3.*2"),
    Bad(lambda: store_slots(slot_mapping=torch.arange(6)[::2]), "'slot_mapping'.*contiguous"),
    Bad(lambda: store_slots(k=torch.randn(3, HKV, D).half()), "'v'.*float16.*float32", TypeError),
    Bad(lambda: store_slots(k=torch.randn(3, D, HKV).transpose(1, 2)), "'k'.*contiguous"),
    Bad(lambda: store_slots(v=torch.randn(3, 1, D)), "'v'.*H=2.*1"),
    Bad(lambda: store_slots(v_pool=torch.zeros(4, HKV, 9, D)), "'v_pool'.*P=8.*9"),
    *(
        Bad(
            lambda start=start: shared_pools(start), "'v_pool': expected memory of its own.*overlap"
        )
        for start in (0, 1, D - 1, 3 * D + 1, 64 * D)
    ),
    Bad(lambda: store_slots(k=torch.empty(3, HKV, D, device="meta")), "'v'.*'k', meta, got cpu"),
    Bad(lambda: store_slots(k_pool=torch.zeros(4, HKV, 8, 80)), "'k_pool'.*D=64.*80"),
    Bad(
        lambda: store_slots(k=torch.randn(3, HKV, 24), k_pool=torch.zeros(4, HKV, 8, 24)),
        "'k'.*multiple of 16.*24",
    ),
    Bad(lambda: linear_rows(x=torch.randn(33, D)), "linear_rows.*'x'.*at most 32 rows.*33"),
    Bad(lambda: linear_rows(x=torch.randn(6, 6, D)), "'x'.*at most 32 rows.*36"),
    Bad(lambda: linear_rows(x=torch.randn(B, D - 1)), "'x'.*in=64.*63"),
    Bad(lambda: linear_rows(x=torch.tensor(1.0)), "'x'.*in.*"),
    Bad(lambda: linear_rows(x=torch.randn(D, B).t()), "'x'.*contiguous"),
    Bad(lambda: linear_rows(x=torch.randn(B, D).half()), "'weight'.*float16.*float32", TypeError),
    Bad(lambda: linear_rows(weight=torch.randn(D, 12).t()), "'weight'.*contiguous"),
    Bad(lambda: linear_rows(weight=torch.randn(1, 12, D)), "'weight'.*shape"),
    Bad(lambda: linear_rows(bias=torch.randn(12, 1)), "'bias'.*out=12"),
    Bad(lambda: linear_rows(bias=torch.randn(24)[::2]), "'bias'.*contiguous"),
    Bad(lambda: linear_rows(bias=torch.randn(12).double()), "'bias'.*float64", TypeError),
    Bad(lambda: merge_states(lse_a=torch.randn(B, 7)), "merge_states.*'lse_a'.*Hq=8.*7"),
    Bad(lambda: merge_states(out_b=torch.randn(B, HQ, D).half()), "'out_b'", TypeError),
    Bad(lambda: merge_states(lse_b=torch.randn(B, HQ).double()), "'lse_b'.*float32", TypeError),
    Bad(lambda: norm_rows(x=torch.randn(B, D - 1)), "norm_rows.*'x'.*D=64.*63"),
    Bad(lambda: norm_rows(x=torch.tensor(1.0)), "'x'.*D.*"),
    Bad(lambda: norm_rows(x=torch.randn(D, B).t()), "'x'.*contiguous"),
    Bad(lambda: norm_rows(x=torch.randn(B, D).half()), "'weight'.*float16.*float32", TypeError),
    Bad(lambda: norm_rows(weight=torch.randn(2 * D)[::2]), "'weight'.*contiguous"),
    Bad(lambda: norm_rows(weight=torch.randn(1, D)), "'weight'.*shape"),
    Bad(lambda: norm_rows(x=torch.randn(B, 0), weight=torch.randn(0)), "'weight'.*at least one"),
    Bad(lambda: norm_rows(eps=-1e-6), "'eps'.*at least 0"),
    Bad(lambda: norm_rows(eps=float("nan")), "'eps'.*finite"),
    Bad(lambda: recurrence_update(first_step=-1), "recurrence_update.*'first_step'.*-1"),
    Bad(lambda: recurrence_update(first_step=2**31 - 8), "'first_step'.*2147483640"),
    Bad(lambda: recurrence_update(born=ints(3, -1)), "'born'.*-1 in row 1"),
    Bad(lambda: recurrence_update(born=ints(3)), "'born'.*B=2.*1"),
    Bad(lambda: recurrence_update(seq_lens=ints(41, T)), "'seq_lens'.*N=40.*41 in row 0"),
    Bad(
        lambda: recurrence_update(hits=torch.zeros(B, 33, HKV, 2, dtype=torch.int32)),
        "'hits'.*32.*33",
    ),
    Bad(
        lambda: recurrence_update(hits=torch.zeros(B, 0, HKV, 2, dtype=torch.int32)),
        "'hits'.*32.*0",
    ),
    Bad(
        lambda: recurrence_update(hits=torch.zeros(B, 3, HKV, 1, dtype=torch.int32)),
        "'hits'.*N=40.*1",
    ),
    Bad(lambda: recurrence_update(hits=torch.zeros(B, 3, HKV, 2)), "'hits'.*int32", TypeError),
    Bad(lambda: recurrence_update(last_hit=torch.zeros(B, HKV, T)), "'last_hit'.*int32", TypeError),
    Bad(
        lambda: recurrence_update(
            last_hit=torch.zeros(B, T, HKV, dtype=torch.int32).transpose(1, 2)
        ),
        "'last_hit'.*contiguous",
    ),
    Bad(
        lambda: recurrence_update(longest=torch.zeros(B, HKV, 39, dtype=torch.int32)),
        "'longest'.*40.*39",
    ),
    Bad(
        lambda: compact_kv(k=torch.randn(B, HKV, T, D).double()),
        "compact_kv.*'k'.*float64",
        TypeError,
    ),
    Bad(lambda: compact_kv(v=torch.randn(B, HKV, T, D).half()), "'v'.*dtype of 'k'", TypeError),
    Bad(lambda: compact_kv(v=torch.randn(B, HKV, T + 1, D)), "'v'.*T=40.*41"),
    Bad(lambda: compact_kv(k=torch.randn(B, HKV, D, T).transpose(2, 3)), "'k'.*contiguous"),
    Bad(
        lambda: compact_kv(state=[torch.zeros(B, HKV, T, dtype=torch.int64)]),
        "'state.0.'.*int64",
        TypeError,
    ),
    Bad(
        lambda: compact_kv(state=[torch.zeros(B, HKV, T), torch.zeros(B, HKV, 39)]),
        "'state.1.'.*40 tokens.*39",
    ),
    Bad(lambda: compact_kv(state=[torch.zeros(B, 1, T)]), "'state.0.'.*U=2.*1"),
    Bad(lambda: compact_kv(state=[torch.zeros(B, HKV, T)] * 9), "'state'.*at most 8.*9"),
    Bad(
        lambda: compact_kv(state=[torch.zeros(B, T, HKV).transpose(1, 2)]), "'state.0.'.*contiguous"
    ),
    Bad(lambda: compact_kv(state=[torch.zeros(B, HKV, T, device="meta")]), "'state.0.'"),
    Bad(lambda: compact_kv(seq_lens=ints(T, 41)), "'seq_lens'.*T=40.*41 in row 1"),
    Bad(lambda: compact_kv(victims=gone([1], [2], [3])), "'victims'.*1 or H=2.*3"),
    Bad(lambda: compact_kv(victims=gone([1, 5], [0, 40])), "'victims'.*40 in row 0, unit 1"),
    Bad(lambda: compact_kv(victims=gone([1, 5], [5, 1])), "'victims'.*1 in row 0, unit 1"),
    Bad(lambda: compact_kv(victims=gone([5, 5], [5, 6])), "'victims'.*5 in row 0, unit 0"),
    Bad(lambda: compact_kv(victims=gone([1, 5], [-2, 1])), "'victims'.*-2 in row 0, unit 1"),
    Bad(lambda: compact_kv(victims=gone([1, -1], [-1, 1])), "'victims'.*1 in row 0, unit 1"),
    Bad(lambda: compact_kv(victims=gone([1, 2], [3, -1])), "'victims'.*2 as in unit 0.*1 in row 0"),
    Bad(lambda: compact_kv(victims=gone([1], [2]).long()), "'victims'.*int32", TypeError),
    Bad(
        lambda: rotate_keys(shift=torch.tensor([1.0, 2.0])),
        "rotate_keys.*'shift'.*float32",
        TypeError,
    ),
    Bad(lambda: rotate_keys(shift=torch.tensor(1)), "'shift'.*one dimension"),
    Bad(lambda: rotate_keys(inv_freq=torch.rand(B, 32)), "'inv_freq'.*one dimension.*2, 32"),
    Bad(lambda: rotate_keys(shift=torch.tensor([1])), "'shift'.*B=2.*1"),
    Bad(lambda: rotate_keys(inv_freq=torch.rand(33)), "'inv_freq'.*D / 2 = 32.*33"),
    Bad(lambda: rotate_keys(inv_freq=torch.rand(0)), "'inv_freq'.*1 to.*0"),
    Bad(lambda: rotate_keys(k=torch.randn(B, HKV, D, T).transpose(2, 3)), "'k'.*contiguous"),
    Bad(lambda: rotate_keys(k=torch.randn(B, HKV, T, D).double()), "'k'.*float64", TypeError),
    Bad(
        lambda: store_segments(k=torch.randn(B, HKV, T, D).double()),
        "store_segments.*'k'.*float64",
        TypeError,
    ),
    Bad(lambda: store_segments(k=torch.randn(B, HKV, D, T).transpose(2, 3)), "'k'.*contiguous"),
    Bad(lambda: store_segments(v=torch.randn(B, HKV, T, D).half()), "'v'.*dtype of 'k'", TypeError),
    Bad(lambda: store_segments(v=torch.randn(B, HKV, T + 1, D)), "'v'.*T=40.*41"),
    Bad(lambda: store_segments(slot_rows=held().long()), "'slot_rows'.*int32", TypeError),
    Bad(lambda: store_segments(slot_rows=held()[:, :1]), "'slot_rows'.*H=2.*1"),
    Bad(lambda: store_segments(slot_rows=held() + 11), "'slot_rows'.*5 rows.*4 in row 0, head 0"),
    Bad(lambda: store_segments(seq_lens=ints(T, 41)), "'seq_lens'.*T=40.*41 in row 1"),
    Bad(lambda: store_segments(seq_lens=ints(13, T)), "'slot_rows'.*5 rows.*3 in row 0, head 0"),
    Bad(lambda: store_segments(slot_rows=held()[:, :, :20]), "'seq_lens'.*T=20.*40 in row 0"),
    Bad(lambda: store_segments(starts=bounds()[:, :, :U]), "'starts'.*7.*6"),
    Bad(lambda: store_segments(starts=bounds() * 2), "'closed'.*10 tokens.*5 in row 0, head 0"),
    Bad(
        lambda: store_segments(starts=bounds() + 38), "'starts'.*50 rows.*48 to 53 in row 0, head 0"
    ),
    Bad(lambda: store_segments(starts=bounds() - 11), "'starts'.*50 rows.*-1 to 4 in row 0"),
    Bad(lambda: store_segments(num_units=ints(7, 0)), "'num_units'.*U=6.*7 in row 0"),
    Bad(lambda: store_segments(num_units=ints(0, 0)), "'num_units'.*0 in row 0"),
    Bad(lambda: store_segments(num_units=ints(3)), "'num_units'.*B=2.*1"),
    Bad(lambda: store_segments(closed=ints(5, -1)), "'closed'.*R=50.*-1 in row 1"),
    Bad(lambda: store_segments(closed=ints(4, 0)), "'closed'.*5 tokens.*4 in row 0"),
    Bad(lambda: store_segments(pool=pool(R)[0]), "'pool'.*list.*Tensor", TypeError),
    Bad(lambda: store_segments(pool=[]), "'pool'.*1 to 32.*0"),
    Bad(lambda: store_segments(pool=pool(*[2] * 33)), "'pool'.*1 to 32.*33"),
    Bad(lambda: store_segments(pool=pool(R, dim=32)), "'pool.0.'.*D=64.*32"),
    Bad(
        lambda: store_segments(pool=[*pool(R), *pool(9, dtype=torch.half)]),
        "'pool.1.'.*dtype of 'k'",
        TypeError,
    ),
    Bad(lambda: store_segments(pool=[pool(2 * R)[0][:, :, ::2]]), "'pool.0.'.*contiguous"),
    Bad(
        lambda: store_segments(pool=[None]), r"'pool\[0\]': expected a tensor, got None", TypeError
    ),
    Bad(
        lambda: store_segments(centroids=torch.zeros(B, HKV, U, D).half()),
        "'centroids'.*dtype of 'k'",
        TypeError,
    ),
    Bad(lambda: store_segments(centroids=torch.zeros(B, HKV, U, 32)), "'centroids'.*D=64.*32"),
    Bad(
        lambda: store_segments(centroids=torch.zeros(B, U, HKV, D).transpose(1, 2)),
        "'centroids'.*last two dimensions contiguous",
    ),
    Bad(
        lambda: fetch_rows(k=torch.randn(B, HKV, T, D).double()),
        "fetch_rows.*'k'.*float64",
        TypeError,
    ),
    Bad(lambda: fetch_rows(v=torch.randn(B, HKV, T, D).half()), "'v'.*dtype of 'k'", TypeError),
    Bad(lambda: fetch_rows(v=torch.randn(B, HKV, D, T).transpose(2, 3)), "'v'.*contiguous"),
    Bad(lambda: fetch_rows(slot_rows=held().long()), "'slot_rows'.*int32", TypeError),
    Bad(lambda: fetch_rows(slot_rows=held()[:, :, :30]), "'seq_lens'.*T=30.*40 in row 1"),
    Bad(lambda: fetch_rows(seq_lens=ints(41, T)), "'seq_lens'.*T=40.*41 in row 0"),
    Bad(lambda: fetch_rows(rows=want([3], [2]).long()), "'rows'.*int32", TypeError),
    Bad(lambda: fetch_rows(rows=want([3], [2])[..., ::2]), "'rows'.*contiguous"),
    Bad(lambda: fetch_rows(rows=want([3, 7], [2, 1])), "'rows'.*2, 25.*1 in row 0, head 1"),
    Bad(lambda: fetch_rows(rows=want([3, 7], [2, 25])), "'rows'.*2, 25.*25 in row 0, head 1"),
    Bad(lambda: fetch_rows(rows=want([3, 3], [2, 4])), "'rows'.*3 in row 0, head 0"),
    Bad(lambda: fetch_rows(rows=want([3, -1, 4], [2, 4])), "'rows'.*4 in row 0, head 0"),
    Bad(lambda: fetch_rows(rows=want([3, -2], [2, 4])), "'rows'.*-2 in row 0, head 0"),
    Bad(lambda: fetch_rows(rows=want([3], [2, 4])), "'rows'.*in every head, 8.*9 in row 0, head 1"),
    Bad(lambda: fetch_rows(pool=pool(20)), "'first_local'.*20.*25 in row 0"),
    Bad(lambda: fetch_rows(first_local=ints(-1, 0)), "'first_local'.*50.*-1 in row 0"),
    Bad(
        lambda: fetch_rows(
            slot_rows=held() + 20, seq_lens=ints(T, T), rows=want(range(2, 14), range(2, 14))
        ),
        "'k'.*room for 47.*in row 0, head 0.*40",
    ),
    Bad(lambda: fetch_rows(first_local=ints(25)), "'first_local'.*B=2.*1"),
    Bad(lambda: fetch_rows(active=torch.ones(B)), "'active'.*int32", TypeError),
    Bad(lambda: fetch_rows(pool=pool(R, dtype=torch.half)), "'pool.0.'.*dtype of 'k'", TypeError),
    Bad(lambda: fetch_rows(pool=tuple(pool(R))), "'pool'.*list.*tuple", TypeError),
    Bad(lambda: fetch_rows(pool=pool(R, device="meta")), "'pool.0.'"),
    Bad(lambda: fetch_rows(num_sinks=-1), "'num_sinks'.*-1"),
    Bad(lambda: rotate_rows(k=torch.randn(B, HKV, 4, D)), "'k'.*n=3.*4"),
    Bad(lambda: rotate_rows(q=torch.randn(B, 3, D)), "'q'.*B, Hq, n, D"),
    Bad(lambda: rotate_rows(cos=torch.randn(3, 3, D)), "'cos'.*1 or B=2.*3"),
    Bad(lambda: rotate_rows(sin=torch.randn(1, 3, D)), "'sin'.*B of cos=2.*1"),
    Bad(lambda: rotate_rows(cos=torch.randn(B, 3, D // 2)), "'cos'.*D=64.*32"),
    Bad(lambda: rotate_rows(sin=torch.randn(B, 3, D).half()), "'sin'.*float32.*16", TypeError),
    Bad(lambda: rotate_rows(q=torch.randn(B, HQ, D, 3).mT), "'q'.*contiguous"),
    Bad(
        lambda: rotate_rows(
            q=torch.randn(B, HQ, 3, 40),
            k=torch.randn(B, HKV, 3, 40),
            **dict.fromkeys(("cos", "sin"), torch.randn(B, 3, 40)),
        ),
        "'q'.*multiple of 16.*40",
    ),
    Bad(
        lambda: append_rows(seq_lens=ints(T - 2, 5)), "37\\], with room for 3 of T=40.*38 in row 0"
    ),
    Bad(lambda: append_rows(seq_lens=ints(T - 3, -1)), "'seq_lens'.*-1 in row 1"),
    Bad(lambda: append_rows(added=ints(3, 4)), "'added'.*m=3.*4 in row 1"),
    Bad(lambda: append_rows(added=ints(3, -1)), "'added'.*-1 in row 1"),
    Bad(lambda: append_rows(added=torch.tensor([3, 1])), "'added'.*int32.*int64", TypeError),
    Bad(lambda: append_rows(logical_lens=ints(T)), "'logical_lens'.*B=2.*1"),
    Bad(lambda: append_rows(v=torch.randn(B, HKV, 2, D)), "'v'.*m=3.*2"),
    Bad(
        lambda: append_rows(k=torch.randn(B, HKV, 3, D).half()), "'v'.*float16.*float32", TypeError
    ),
    Bad(lambda: append_rows(v_cache=torch.zeros(B, HKV, T + 1, D)), "'v_cache'.*T=40.*41"),
    Bad(lambda: append_rows(k_cache=torch.zeros(B, HKV, D, T).mT), "'k_cache'.*contiguous"),
    Bad(
        lambda: append_rows(words=torch.zeros(B, HKV, 3, dtype=torch.int32)),
        "'words_cache'.*words.*None",
    ),
    Bad(
        lambda: append_rows(words_cache=torch.zeros(B, HKV, T, dtype=torch.int32)),
        "'words'.*None",
    ),
    Bad(
        lambda: append_rows(
            words=torch.zeros(B, HKV, 3, dtype=torch.int32), words_cache=torch.zeros(B, HKV, T)
        ),
        "'words_cache'.*int32.*float32",
        TypeError,
    ),
    Bad(lambda: append_rows(k=torch.empty(B, HKV, 3, D, device="meta")), "'v'.*'k', meta, got cpu"),
]
