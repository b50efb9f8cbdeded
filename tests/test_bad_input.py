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


def test_nothing_is_written_before_the_checks_pass():
    logits = torch.full((B, HQ, T), 7.0)
    with pytest.raises(ValueError):
        attention(seq_lens=ints(T, T + 1), logits=logits)
    assert (logits == 7).all()
