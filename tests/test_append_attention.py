"""A checked token has the bits of a plain step: whatever the threads, the batch and the others."""

import pytest
import torch

from kvcomp.ops import OPS
from kvcomp.selftest.case import HALF_AND_FULL, attention_inputs, ints
from kvcomp.selftest.code_cases import codes_of

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
SLOTS, HEADS, KV_HEADS, COUNT, SCALE = 1104, 6, 2, 7, 0.11
LENS = 1100, 515, 61, 7  # the new tokens lie on both sides of a span's end, of a tile's, and alone


def inputs(dtype, dim, layout, count=COUNT, kv_heads=KV_HEADS):
    heads = HEADS // KV_HEADS * kv_heads
    q, k, v = attention_inputs(len(LENS), heads * count, kv_heads, SLOTS, dim, dtype, layout)
    return q.unflatten(1, (count, heads)), k, v


def table(page_size):
    """All pages of each row, in an order of its own."""
    order = torch.rand(len(LENS), 1, SLOTS // page_size, generator=torch.Generator().manual_seed(2))
    return order.argsort(-1).int()


def one_by_one(name, q, k, v, lens, page_ids, page_size, words=None):
    """Each query alone, after the tokens that it sees."""
    decode, count = OPS["decode_attention"].impl(name), q.shape[1]
    rows = [
        decode(q[:, i], k, v, lens - (count - 1 - i), page_ids, page_size, SCALE, None, words)
        for i in range(count)
    ]
    return tuple(torch.stack(parts, 1) for parts in zip(*rows, strict=True))


def same(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("layout", ["head", "token"])
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_the_bits_of_plain_steps(dtype, layout, page_size, threads):
    append = OPS["append_attention"].impl("cpu")
    where = (table(page_size), page_size) if page_size else (None, 1)
    lens = ints(LENS)
    for dim, kv_heads in (64, KV_HEADS), (80, 8):
        q, k, v = inputs(dtype, dim, layout, kv_heads=kv_heads)
        got = append(q, k, v, lens, None, None, *where, SCALE, None)
        torch.set_num_threads(1)
        same(got, one_by_one("cpu", q, k, v, lens, *where))
        torch.set_num_threads(threads)
        for row in range(len(LENS)):  # and each sequence has them alone
            pages = where[0] if where[0] is None else where[0][row : row + 1]
            rows = (x[row : row + 1] for x in (q, k, v, lens))
            alone = append(*rows, None, None, pages, where[1], SCALE, None)
            same(alone, (x[row : row + 1] for x in got))


@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_the_bits_of_plain_steps_over_codes(dim, group):
    """Also where scales are below 0, or not finite: then one token poisons those who see it."""
    q, k, v = attention_inputs(
        len(LENS), KV_HEADS * group * COUNT, KV_HEADS, SLOTS, dim, torch.float32
    )
    q, lens = q.unflatten(1, (COUNT, KV_HEADS * group)), ints(LENS)
    k, v, words = codes_of(k, v)
    scales = words.view(torch.float16).unflatten(-1, (SLOTS, 2))
    scales[0, 0, 70:90] *= -1
    scales[0, 1, 600, 1] = scales[1, 1, 511, 0] = torch.nan  # seen by all queries, and by four
    given = q, k, v, lens, None, None, None, 1, SCALE, None, words
    got = OPS["append_attention"].impl("cpu")(*given)
    for a, b in zip(got, one_by_one("cpu", q, k, v, lens, None, 1, words), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    exact = OPS["append_attention"].reference(q.double(), *given[1:])
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-3, equal_nan=True)
    poisoned = got[0].isnan().any(-1).unflatten(-1, (KV_HEADS, group))[..., 0]
    assert poisoned.sum((1, 2)).tolist() == [COUNT, 4, 0, 0]


def test_the_bits_of_fewer_queries(threads):
    """More rows than are in work together; a causal mask written out as bits; unlike numbers."""
    append = OPS["append_attention"].impl("cpu")
    count, lens, q_lens = 64, ints([1100, 530, 64, 70]), ints([64, 33, 64, 1])
    q, k, v = inputs(torch.float32, 32, "head", count)
    causal = torch.tensor([2 ** (i + 1) - 1 for i in range(63)] + [-1]).expand(4, -1)
    out, lse = append(q, k, v, lens, q_lens, None, None, 1, SCALE, None)
    same((out, lse), append(q, k, v, lens, q_lens, causal, None, 1, SCALE, None))
    for row, n in enumerate(q_lens.tolist()):
        rows = q[row : row + 1, :n], *(x[row : row + 1] for x in (k, v, lens))
        alone = append(*rows, None, None, None, 1, SCALE, None)
        same(alone, (out[row : row + 1, :n], lse[row : row + 1, :n]))
        assert (out[row, n:] == 0).all() and (lse[row, n:] == -torch.inf).all()


def test_a_tree_is_its_paths():
    """Drafts 1, 2 behind the root, 3 behind 1: each path as if it were the sequence."""
    parents = [None, 0, 0, 1]
    seen = []
    for node, parent in enumerate(parents):
        seen.append({node} | (set() if parent is None else seen[parent]))
    tail = torch.tensor([[sum(1 << j for j in nodes) for nodes in seen]]).expand(len(LENS), -1)
    q, k, v = inputs(torch.float64, 64, "head", len(parents))
    lens = ints(LENS)
    got = OPS["append_attention"].reference(q, k, v, lens, None, tail, None, 1, SCALE, None)
    for row, length in enumerate(LENS):
        for node, nodes in enumerate(seen):
            slots = [*range(length - len(parents)), *(length - len(parents) + j for j in nodes)]
            path = (x[row : row + 1, :, sorted(slots)] for x in (k, v))
            want = OPS["decode_attention"].reference(
                q[row : row + 1, node], *path, ints([len(slots)]), None, 1, SCALE, None
            )
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a[row, node], b[0])


@pytest.mark.parametrize("count", [2, 5, 14])  # 6, 15, 42 rows: 1, 2 and 4 fragments, two blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cuda_kernel_gives_the_bits_of_plain_steps(dtype, count):
    """Where the tokens are divided alike: the same number of them, or up to 256."""
    append, decode = (OPS[f"{name}_attention"].impl("cuda-host") for name in ("append", "decode"))
    q, k, v = attention_inputs(2, HEADS * count, KV_HEADS, 330, 32, dtype)
    q, lens = q.unflatten(1, (count, HEADS)), ints([330, 300])
    given = k, v, lens, None, None, None, 1, SCALE, None
    last = tuple(x[:, -1:] for x in append(q, *given))
    same(last, append(q[:, -1:], *given))
    want = decode(q[:, -1], k, v, lens, None, 1, SCALE, None)
    same((x[:, 0] for x in last), want)
    short = ints([40, 150])  # one split, whatever the length
    got = append(q, k, v, short, None, None, None, 1, SCALE, None)
    same(got, one_by_one("cuda-host", q, k, v, short, None, 1))


@pytest.mark.parametrize("offset", [0, 1])
def test_logits_of_a_cache_larger_than_the_processors(offset):
    """They are written past the caches, whole lines of them: a short prefix has the same."""
    attend, generator = OPS["decode_attention"].impl("cpu"), torch.Generator().manual_seed(0)
    length, prefix = (1 << 15) + 21, 200  # 32 MiB of K and V
    k = torch.randn(1, 1, length, 256, generator=generator).bfloat16()
    q = torch.randn(1, 3, 256, generator=generator).bfloat16()

    def logits_of(first):
        logits = torch.full((1, 3, length + 16 + offset), torch.nan)[..., offset:]
        lens = torch.tensor([first], dtype=torch.int32)
        attend(q, k, k, lens, None, 1, SCALE, logits)
        assert logits[..., first:].isnan().all()
        return logits[..., :first]

    whole = logits_of(length)
    assert torch.equal(whole[..., :prefix], logits_of(prefix))
    want = torch.einsum("bhd,btd->bht", q.float(), k[:, 0].float()) * SCALE
    torch.testing.assert_close(whole, want, rtol=1e-3, atol=1e-3)
