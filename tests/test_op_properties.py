"""Every CPU kernel against its reference, on inputs of any shape that hypothesis can think of."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from kvcomp.ops import HEAD_SIZES, OPS
from kvcomp.ops._widen import in_float64
from kvcomp.selftest.case import HALF_AND_FULL, Case, ints, kv_cache
from kvcomp.selftest.compare import assert_close, outputs

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = 420  # of each op

dims = st.sampled_from(HEAD_SIZES)
layouts = st.sampled_from(["head", "token", "slab", "crooked"])


class Draw:
    """What the inputs below are drawn with."""

    def __init__(self, data):
        self.of = data.draw
        self.generator = torch.Generator().manual_seed(self.int(0, 2**20))
        self.dtype = torch.float32

    def int(self, low, high):
        return self.of(st.integers(low, high))

    def lens(self, batch, most, least=0):
        return [self.int(least, most) for _ in range(batch)]

    def normal(self, *shape, scale=1.0):
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def ranking(self, *shape):
        """Scores: all different, or with ties, NaN and infinities."""
        scores = torch.randn(shape, generator=self.generator)
        if self.of(st.booleans()):
            scores = (scores * self.int(0, 3)).floor()
            for value in (torch.nan, torch.inf, -torch.inf):
                scores[torch.rand(shape, generator=self.generator) < 0.05] = value
        return scores

    def logits(self, batch, heads, slots):
        """[B, Hq, N] with NaN past each row's end, its lse and its length."""
        lens = ints(self.lens(batch, slots, least=1))
        past = torch.arange(slots) >= lens[:, None, None]
        logits = torch.randn(batch, heads, slots, generator=self.generator) * 3
        lse = logits.masked_fill(past, -torch.inf).logsumexp(-1)
        return logits.masked_fill(past, torch.nan), lse, lens


def decode_attention(draw):
    batch, kv_heads, group = draw.int(1, 3), draw.int(1, 4), draw.int(1, 9)
    slots, dim, layout = draw.int(1, 300), draw.of(dims), draw.of(layouts)
    draw.dtype = draw.of(st.sampled_from(HALF_AND_FULL))
    q = draw.normal(batch, kv_heads * group, dim, scale=2.0)
    shape = (batch, kv_heads, slots, dim)
    k, v = (kv_cache(shape, draw.dtype, draw.generator, layout) for _ in "kv")
    page_ids, page_size, room = None, 1, slots
    if draw.of(st.booleans()):
        page_size = draw.of(st.sampled_from([1, 2, 3, 16, 32]))
        pages, sets = -(-slots // page_size) - (slots % page_size > 0), draw.of(st.booleans())
        if pages:
            lists = torch.rand(batch, kv_heads if sets else 1, pages, generator=draw.generator)
            page_ids = lists.argsort(-1)[..., : draw.int(1, pages)].int()
            if draw.of(st.booleans()):
                page_ids[..., :: draw.int(1, 4)] = -1
            room = page_ids.shape[-1] * page_size
        else:
            page_size = 1
    if page_ids is not None and draw.int(0, 1):  # a pool of pages
        pages = draw.int(1, 9)
        shape, page_ids = (pages, kv_heads, page_size, dim), page_ids[:, 0] % pages
        k, v = (kv_cache(shape, draw.dtype, draw.generator, layout) for _ in "kv")
    logits = torch.full((batch, kv_heads * group, room), torch.nan) if draw.int(0, 1) else None
    return q, k, v, ints(draw.lens(batch, room)), page_ids, page_size, dim**-0.5, logits


def append_attention(draw):
    q, k, v, lens, page_ids, size, scale, _ = decode_attention(draw)
    room = k.shape[2] if page_ids is None else page_ids.shape[-1] * size
    if page_ids is not None:  # no holes among the new tokens
        page_ids = page_ids.clamp(min=0)
    batch, heads, dim = q.shape
    count = draw.int(1, min(room, 64))
    q = draw.normal(batch, heads, count, dim, scale=2.0).transpose(1, 2)
    lens, q_lens = ints(draw.lens(batch, room, least=count)), None
    if draw.int(0, 1):
        q_lens = ints(draw.lens(batch, count))
    tail = None
    if draw.int(0, 1):
        tail = torch.randint(-(2**63), 2**63 - 1, (batch, count), generator=draw.generator)
    logits = torch.full((batch, count, heads, room), torch.nan) if draw.int(0, 1) else None
    return q, k, v, lens, q_lens, tail, page_ids, size, scale, logits


def latent_attention(draw):
    batch, heads, slots = draw.int(1, 3), draw.int(1, 40), draw.int(1, 300)
    value_dim, layout = 16 * draw.int(1, 6), draw.of(layouts)
    dim = value_dim + 16 * draw.int(0, 3)
    draw.dtype = draw.of(st.sampled_from(HALF_AND_FULL))
    q = draw.normal(batch, heads, dim, scale=2.0)
    rows = kv_cache((batch, 1, slots, dim), draw.dtype, draw.generator, layout)[:, 0]
    page_ids, page_size, room = None, 1, slots
    if draw.of(st.booleans()):
        page_size = draw.int(1, min(slots, 32))
        order = torch.rand(batch, 1, slots // page_size, generator=draw.generator).argsort(-1)
        page_ids = order[..., : draw.int(1, order.shape[-1])].int()
        if draw.of(st.booleans()):
            page_ids[..., :: draw.int(1, 4)] = -1
        room = page_ids.shape[-1] * page_size
    logits = torch.full((batch, heads, room), torch.nan) if draw.int(0, 1) else None
    lens = ints(draw.lens(batch, room))
    return q, rows, lens, page_ids, page_size, value_dim, dim**-0.5, logits


def linear_rows(draw):
    draw.dtype = draw.of(st.sampled_from(HALF_AND_FULL))
    rows, outputs, width = draw.int(0, 20), draw.int(0, 40), draw.int(0, 300)
    gap_x, gap = draw.int(0, 3), draw.int(0, 3)
    x = draw.normal(rows, width + gap_x)[:, gap_x:]
    weight = draw.normal(outputs, width + gap)[:, gap:]
    return x, weight, draw.normal(outputs) if draw.int(0, 1) else None


def norm_rows(draw):
    draw.dtype = draw.of(st.sampled_from(HALF_AND_FULL))
    rows, width = draw.int(0, 20), draw.int(1, 300)
    return draw.normal(rows, width), draw.normal(width), 10.0 ** -draw.int(3, 9)


def rotate_rows(draw):
    draw.dtype = draw.of(st.sampled_from(HALF_AND_FULL))
    batch, tokens, dim = draw.int(1, 4), draw.int(0, 6), 16 * draw.int(1, 20)
    q, k = (draw.normal(batch, tokens, draw.int(1, 7), dim).transpose(1, 2) for _ in "qk")
    angles = draw.of(st.sampled_from([1, batch]))
    return q, k, draw.normal(angles, tokens, dim), draw.normal(angles, tokens, dim)


def merge_states(draw):
    draw.dtype = draw.of(st.sampled_from(HALF_AND_FULL))
    batch, heads, dim = draw.int(1, 4), draw.int(1, 9), draw.of(dims)
    outs = [draw.normal(batch, heads, dim) for _ in "ab"]
    lses = [torch.randn(batch, heads, generator=draw.generator) * 4 for _ in "ab"]
    for out, lse in zip(outs, lses, strict=True):
        empty = torch.rand(batch, heads, generator=draw.generator) < 0.2
        out[empty], lse[empty] = 0, -torch.inf
    return outs[0], lses[0], outs[1], lses[1]


def page_scores(draw):
    groups = draw.int(1, 3)
    logits, lse, lens = draw.logits(draw.int(1, 3), groups * draw.int(1, 6), draw.int(1, 400))
    size = draw.of(st.sampled_from([1, 4, 16, 32, 64]))
    return logits, lse, lens, size, groups, draw.of(st.booleans())


def select_pages(draw):
    batch, size, pages = draw.int(1, 3), draw.of(st.sampled_from([1, 4, 16])), draw.int(1, 300)
    count, recent = draw.int(1, pages + 5), 1
    recent = draw.int(1, count)
    scores = draw.ranking(batch, draw.int(1, 3), pages)
    lens = ints(draw.lens(batch, pages * size))
    return scores, lens, size, count, recent, draw.int(0, count - recent)


def attend_and_select(draw):
    *inputs, page_ids, size, scale, _ = decode_attention(draw)
    q, k = inputs[:2]
    if page_ids is None:
        size, room = draw.of(st.sampled_from([1, 4, 16, 32])), k.shape[2]
    else:  # no holes, whose logits an op may leave alone
        page_ids, room = page_ids.clamp(min=0), page_ids.shape[-1] * size
    logits = torch.full((*q.shape[:2], room + draw.int(0, 9)), torch.nan)
    count = draw.int(1, room // size + 3)
    recent = draw.int(1, count)
    groups = draw.of(st.sampled_from([1, k.shape[1]]))
    rest = groups, draw.of(st.booleans()), recent, draw.int(0, count - recent)
    return *inputs, page_ids, size, count, scale, logits, *rest


def store_slots(draw):
    tokens, heads, dim = draw.int(0, 20), draw.int(1, 5), draw.of(dims)
    pages, size = draw.int(1, 9), draw.of(st.sampled_from([1, 4, 16]))
    tokens = min(tokens, pages * size)
    draw.dtype, layout = draw.of(st.sampled_from(HALF_AND_FULL)), draw.of(layouts)
    k, v = (draw.normal(tokens, heads, dim) for _ in "kv")
    pools = [kv_cache((pages, heads, size, dim), draw.dtype, draw.generator, layout) for _ in "kv"]
    slots = torch.randperm(pages * size, generator=draw.generator)[:tokens]
    slots[torch.rand(tokens, generator=draw.generator) < 0.2] = -1
    return k, v, *pools, slots


def append_rows(draw):
    batch, heads, dim = draw.int(1, 4), draw.int(1, 5), draw.int(1, 70)
    count, slots = draw.int(0, 9), draw.int(9, 40)
    draw.dtype, layout = draw.of(st.sampled_from(HALF_AND_FULL)), draw.of(layouts)
    k, v = (kv_cache((batch, heads, count, dim), draw.dtype, draw.generator, layout) for _ in "kv")
    if draw.of(st.booleans()):
        k = draw.normal(batch, heads, dim, count).transpose(2, 3)
    layout = draw.of(layouts)
    caches = [
        kv_cache((batch, heads, slots, dim), draw.dtype, draw.generator, layout) for _ in "kv"
    ]
    added = ints(draw.lens(batch, count)) if draw.of(st.booleans()) else None
    lens = ints(draw.lens(batch, slots - count))
    return k, v, *caches, lens, lens + 3 if draw.of(st.booleans()) else None, None, None, added


def attention_hits(draw):
    units = draw.int(1, 3)
    logits, lse, lens = draw.logits(draw.int(1, 3), units * draw.int(1, 5), draw.int(1, 400))
    words = -(-logits.shape[-1] // 32) + draw.int(0, 2)
    hits = torch.full((len(lens), units, words), -1, dtype=torch.int32)
    return logits, lse, lens, hits, -draw.of(st.floats(0.5, 12))


def recurrence_update(draw):
    batch, units, steps, slots = draw.int(1, 3), draw.int(1, 3), draw.int(1, 32), draw.int(1, 300)
    first_step, lens = draw.int(0, 2**20), draw.lens(batch, slots)
    shape = (batch, steps, units, -(-slots // 32))
    hits = torch.randint(-(2**31), 2**31, shape, generator=draw.generator).int()
    for _ in range(draw.int(0, 4)):
        hits &= torch.randint(-(2**31), 2**31, shape, generator=draw.generator).int()
    silent = torch.randint(1, 100_000, (2, batch, units, slots), generator=draw.generator)
    last_hit, longest = (first_step - silent[0]).int(), (silent[1] // 2).int()
    born = [draw.int(0, min(n, steps)) for n in lens]
    return hits, last_hit, longest, ints(lens), ints(born), first_step


def select_victims(draw):
    batch, units, slots = draw.int(1, 3), draw.int(1, 3), draw.int(1, 500)
    lens = draw.lens(batch, slots)
    kept = [draw.int(0, n + 3) for n in lens]
    past = torch.arange(slots) >= ints(lens)[:, None, None]
    order = torch.rand(batch, units, slots, generator=draw.generator).argsort(-1).int()
    count = max(0, *(n - k for n, k in zip(lens, kept, strict=True)), 0) + draw.int(0, 3)
    recent = draw.int(0, min(kept))
    scores = draw.ranking(batch, units, slots).masked_fill(past, torch.nan)
    return scores, order * 3, ints(lens), ints(kept), count, recent


def compact_kv(draw):
    batch, heads, slots, dim = draw.int(1, 3), draw.int(1, 3), draw.int(1, 200), draw.of(dims)
    draw.dtype, layout = draw.of(st.sampled_from(HALF_AND_FULL)), draw.of(layouts)
    shape = (batch, heads, slots, dim)
    k, v = (kv_cache(shape, draw.dtype, draw.generator, layout) for _ in "kv")
    units, lens = draw.of(st.sampled_from([1, heads])), draw.lens(batch, slots)
    counts = [draw.int(0, n) for n in lens]
    victims = torch.full((batch, units, max(counts) + draw.int(0, 2)), -1, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lens, counts, strict=True)):
        for unit in range(units):
            slot = torch.randperm(length, generator=draw.generator)[:count]
            victims[row, unit, :count] = slot.sort().values
    notes = [torch.randint(0, 99, (batch, units, slots), generator=draw.generator).int()]
    return k, v, notes[: draw.int(0, 1)], victims, ints(lens)


def freed(args):
    """compact_kv leaves what lies behind the survivors unspecified."""
    left = args[4] - (args[3][:, 0] >= 0).sum(-1)
    for tensor in (args[0], args[1], *args[2]):
        for row, length in enumerate(left.tolist()):
            tensor[row, :, length:] = 0


def unattended(args):
    """Attention leaves the logits past a row's end, and of holes, alone or at -inf."""
    logits = args[{8: 7, 10: 9}.get(len(args), 8)]
    if logits is not None:
        logits[~logits.isfinite()] = 0


def rotate_keys(draw):
    batch, heads, slots, dim = draw.int(1, 3), draw.int(1, 3), draw.int(0, 70), draw.of(dims)
    draw.dtype, layout = draw.of(st.sampled_from(HALF_AND_FULL)), draw.of(layouts)
    k = kv_cache((batch, heads, slots, dim), draw.dtype, draw.generator, layout)
    half = draw.int(1, dim // 2)
    angle = torch.tensor(draw.lens(batch, 40_000, least=-40_000))[:, None] * torch.logspace(
        0, -4, half, dtype=torch.float64
    )
    return k, angle.cos().float(), angle.sin().float()


def query_similarity(draw):
    draw.dtype = draw.of(st.sampled_from(HALF_AND_FULL))
    shape = draw.int(1, 4), draw.int(1, 20), draw.of(dims)
    return draw.normal(*shape), draw.normal(*shape)


def select_units(draw):
    batch, heads, units = draw.int(1, 3), draw.int(1, 3), draw.int(1, 200)
    sizes = torch.randint(
        0, draw.int(0, 40) + 1, (batch, heads, units + 1), generator=draw.generator
    )
    active = ints(draw.lens(batch, 1))
    indexed = ints(draw.lens(batch, units))
    return (
        draw.ranking(batch, heads, units),
        sizes.cumsum(-1).int(),
        indexed,
        active,
        draw.int(1, 600),
    )


INPUTS = {  # op -> how its arguments are drawn, which of them it writes, what to blank
    "append_attention": (append_attention, (9,), unattended),
    "append_rows": (append_rows, (2, 3, 4, 5), None),
    "decode_attention": (decode_attention, (7,), unattended),
    "latent_attention": (latent_attention, (7,), unattended),
    "linear_rows": (linear_rows, (), None),
    "merge_states": (merge_states, (), None),
    "norm_rows": (norm_rows, (), None),
    "rotate_rows": (rotate_rows, (), None),
    "page_scores": (page_scores, (), None),
    "select_pages": (select_pages, (), None),
    "attend_and_select": (attend_and_select, (8,), unattended),
    "attention_hits": (attention_hits, (3,), None),
    "store_slots": (store_slots, (2, 3), None),
    "recurrence_update": (recurrence_update, (1, 2), None),
    "select_victims": (select_victims, (), None),
    "compact_kv": (compact_kv, (0, 1, 2), freed),
    "rotate_keys": (rotate_keys, (0,), None),
    "query_similarity": (query_similarity, (1,), None),
    "select_units": (select_units, (), None),
}


@pytest.mark.parametrize("name", INPUTS)
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_kernel_is_its_reference(name, data):
    arguments, mutates, blank = INPUTS[name]
    args = arguments(Draw(data))
    mutates = tuple(i for i in mutates if args[i] is not None)
    case = Case(name, "drawn", lambda dtype, device: args, mutates=mutates, blank=blank)
    op = OPS[name]
    truth = outputs(op.reference, case, in_float64(copied(args)))
    plain = outputs(op.impls["reference"], case, copied(args))
    got = outputs(op.impls["cpu"], case, copied(args))
    for index, (a, want, fallback) in enumerate(zip(got, truth, plain, strict=True)):
        if a.dtype == torch.float32:  # the reference may be lucky where there is but one number
            torch.testing.assert_close(a.double(), want, rtol=1e-5, atol=1e-5)
        elif a.is_floating_point():
            assert_close(a, want, fallback, f"{name} output {index}")
        else:
            assert torch.equal(a, want)


def copied(args):
    """Copies of what an op may write, of the same strides."""

    def copy(x):
        if isinstance(x, list):
            return [copy(each) for each in x]
        if not isinstance(x, torch.Tensor):
            return x
        return x.new_empty(0).set_(
            x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride()
        )

    return tuple(copy(x) for x in args)
