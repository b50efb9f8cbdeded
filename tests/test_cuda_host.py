"""The emulated CUDA execution model: what it computes, and the mistakes that it does not let pass.

The probes are small kernels in cuda_host_probes.cpp and cuda_host_global_memory.cpp, built here
against the emulator's sources, as kernels are in the extension ("watched") and under the address
and undefined-behaviour sanitizers.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import emulated
from kvcomp.ops import HEAD_SIZES, OPS
from kvcomp.ops.attend_and_select import in_turn
from kvcomp.selftest.case import Case, attention_inputs, ints
from kvcomp.selftest.code_cases import codes_of
from kvcomp.selftest.compare import check

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

WATCHED = ["-fsanitize=thread,alignment"]
BUILDS = {
    "watched": (WATCHED, []),
    "ucontext": (WATCHED, ["-DKVCOMP_UCONTEXT"]),  # fibers as on other processors
    "asan": 2 * (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],),
}

RIGHT = (
    *("indices", "softmax", "dynamic_shared", "shuffles", "votes", "atomics", "warp_memory"),
    *("intrinsics", "matrices", "after_failure"),
    *("sum", "sum_all_fence", "chain", "replace", "counts", "neighbours", "stream"),
    *("rotate", "swap", "copy_async", "vectors"),
)

WHO = r"^kvcomp cuda-host: kernel probe, block \(0, 0, 0\), thread \(%d, 0, 0\): "
REFUSED = {
    "divergent_barrier": (WHO % 40) + r"the block is split over barriers: thread \(0, 0, 0\) and 39"
    r" more at __syncthreads \(cuda_host_probes.cpp:\d+\); thread \(40, 0, 0\) and 23 more at",
    "early_warp": (WHO % 0) + r"waits for ever: .*at __syncthreads .*; thread \(1, 0, 0\) and 31"
    r" more at __shfl_xor_sync of lanes 0xffffffff",
    "returned_lane": (WHO % 0) + r"waits for ever: .*30 more at __ballot_sync of lanes 0xffffffff"
    r" .*; thread \(5, 0, 0\) returned",
    "foreign_mask": (WHO % 31) + r"__syncwarp: its mask lacks its own lane",
    "foreign_lane": (WHO % 0) + r"__shfl_sync: reads lane 20, which its mask lacks",
    "crooked_copy": (WHO % 0) + r"copy_async: an address that is not aligned to 16 bytes",
    "throwing": r"^thrown by a kernel$",
    "too_many_threads": r"invalid launch: .*block \(64, 32, 1\)",
}
# What takes the compiler's report of every access.
REFUSED_WATCHED = {
    "unwritten": (WHO % 63) + r"reads shared memory that no thread of the block has written",
    "unwritten_in_second_block": (WHO % 10) + r"reads shared memory that no thread of the block",
    "early_read": (WHO % 0) + r"reads shared memory that no thread of the block has written",
    "race": (WHO % 1) + r"writes shared memory that thread 0 read, with no barrier in between",
    "warp_race": (WHO % 31) + r"reads shared memory that thread 30 wrote, with no barrier",
    "past_dynamic": (WHO % 0)
    + r"touches byte 67 of dynamic shared memory; the launch asked for 64",
}


def conflict(block: int, thread: int, what: str) -> str:
    who = f"kvcomp cuda-host: kernel probe, block ({block}, 0, 0), thread ({thread}, 0, 0): "
    return "^" + re.escape(who + what.replace("global", "global memory that"))


UNORDERED = ", with no barrier in between"
UNRELEASED = ", which that block has not released (a barrier if by another thread, __threadfence,"
UNACQUIRED = ", which this thread has not acquired (an atomic on the same word, __threadfence, a"
WROTE, READ = " of block (0, 0, 0) wrote", " of block (0, 0, 0) read"
REFUSED_WATCHED |= {
    # From block to block.
    "sum_without_fence": conflict(2, 0, "reads global thread 31" + WROTE + UNRELEASED),
    "sum_without_barrier": conflict(2, 0, "reads global thread 31" + WROTE + UNRELEASED),
    "sum_written_late": conflict(2, 0, "reads global thread 31" + WROTE + UNRELEASED),
    "sum_without_second_fence": conflict(2, 0, "reads global thread 31" + WROTE + UNACQUIRED),
    "sum_without_second_barrier": conflict(2, 31, "reads global thread 0" + WROTE + UNACQUIRED),
    "sum_of_own_counters": conflict(2, 0, "reads global thread 31" + WROTE + UNACQUIRED),
    "broken_chain": conflict(2, 0, "reads global thread 0" + WROTE + UNACQUIRED),
    "replace_without_first": conflict(2, 0, "writes global warp 0" + READ + UNRELEASED),
    "look_at_count": conflict(2, 0, "writes global thread 0 of block (1, 0, 0) read" + UNRELEASED),
    "same_word": conflict(1, 0, "writes global thread 0" + WROTE + UNRELEASED),
    "in_place_copy": conflict(1, 0, "reads global thread 0" + WROTE + UNRELEASED),
    "copy_async_of_block": conflict(1, 0, "reads global thread 0" + WROTE + UNRELEASED),
    # In a block.
    "rotate_without_barrier": conflict(0, 1, "writes global thread 0 read" + UNORDERED),
    "rotate_without_second_barrier": conflict(0, 1, "writes global thread 0 read" + UNORDERED),
    "swap_of_warps": conflict(0, 63, "writes global thread 31 read" + UNORDERED),
    "copy_async_early_write": conflict(0, 0, "copies global thread 0 wrote before the copy was"),
    "crooked_vectors": (WHO % 0) + r"touches a '.*float4' at an address that is not aligned to 16",
}
REFUSED_ASAN = {
    "crooked_vectors": r"runtime error: .* misaligned address .* for type '.*float4'",
    "past_dynamic": r"AddressSanitizer: use-after-poison",
    "past_static": r"AddressSanitizer: global-buffer-overflow",
    "past_global": r"AddressSanitizer: heap-buffer-overflow",
}


def runs():
    refused_by = {"watched": REFUSED_WATCHED, "ucontext": REFUSED_WATCHED, "asan": REFUSED_ASAN}
    for build, refused in refused_by.items():
        for probe in RIGHT:
            yield build, probe, r"^ok$"
        for probe, error in (REFUSED | refused).items():
            yield build, probe, error


def build_probes(target: Path, probe_flags: list[str], link_flags: list[str]) -> Path:
    base = [COMPILER, "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    base += ["-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    objects = []
    for source in TESTS.glob("cuda_host_*.cpp"):
        objects.append(target.with_name(f"{target.name}-{source.stem}.o"))
        subprocess.run([*base, *probe_flags, "-c", source, "-o", objects[-1]], check=True)
    emulator = sorted((CSRC / "emulator").glob("*.cpp"))
    subprocess.run([*base, *link_flags, *emulator, *objects, "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def executables(tmp_path_factory):
    """build -> path of the probes."""
    if COMPILER is None or not CSRC.exists():
        pytest.skip("needs a C++ compiler and the sources")
    folder = tmp_path_factory.mktemp("probes")
    with ThreadPoolExecutor() as pool:
        built = {name: pool.submit(build_probes, folder / name, *BUILDS[name]) for name in BUILDS}
    return {name: future.result() for name, future in built.items()}


@pytest.mark.parametrize(
    "build, probe, output", [pytest.param(*run, id=run[0] + "-" + run[1]) for run in runs()]
)
def test_probe(executables, build, probe, output):
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    # An abandoned thread never frees what its stack owned.
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    run = subprocess.run(
        [executables[build], probe], env=environment, capture_output=True, text=True, timeout=60
    )
    assert re.search(output, run.stdout + run.stderr, re.MULTILINE), run.stdout + run.stderr
    if output == r"^ok$":
        assert run.returncode == 0, run.stderr


def test_an_emulator_that_cannot_be_built_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(emulated, "folder", lambda: tmp_path)
    op = OPS["merge_states"]
    with pytest.raises(RuntimeError, match=r"(?s)cannot be built.*no-such-compiler"):
        emulated.load.__wrapped__()
    assert "cuda-host" not in op.impls, "an op without CUDA code"


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 6, 7, 12, 16, 48, 100, 128, 130, 512, 520, 1000])
@pytest.mark.parametrize("heads", [3, 9, 37])
def test_every_tile_of_page_scores(page_size, heads):
    """Page sizes against the tile, slices of heads, 16-byte loads and single ones, long tails."""
    op = OPS["page_scores"]
    for slots, use_max in (700, True), (1100, False), (1101, True):
        logits = torch.randn(2, 2 * heads, slots) * 2
        lse = logits.logsumexp(-1)
        lens = torch.tensor([slots - slots // 3, slots], dtype=torch.int32)
        args = lse, lens, page_size, 2, use_max
        got = op.impl("cuda-host")(logits, *args)
        want = op.reference(logits.double(), lse.double(), *args[1:])
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("num_pages", [1, 31, 33, 1023, 1025, 4097])
@pytest.mark.parametrize("kind", ["distinct", "few", "nan", "infinite", "zeros"])
def test_every_road_of_select_pages(num_pages, kind):
    """Stretches that end anywhere, cuts after each round, ties up to everything."""
    op = OPS["select_pages"]
    scores = torch.randn(2, 2, num_pages + 3)[..., :num_pages] * 1e-4
    if kind == "few":
        scores = scores.sign()
    elif kind == "nan":
        scores[scores < 0] = torch.nan
    elif kind == "infinite":
        scores[scores < 0], scores[scores > 1e-4] = -torch.inf, torch.inf
    elif kind == "zeros":
        scores = torch.zeros_like(scores)
        scores[..., ::3], scores[..., ::7] = -0.0, torch.nan
    lens = torch.tensor([num_pages * 3, num_pages * 2 - 1], dtype=torch.int32)
    for recent, sink, free in (1, 0, 0), (2, 4, 1), (8, 0, 60), (1, 1, 900):
        args = lens, 3, recent + sink + free, recent, sink
        for got, want in zip(
            op.impl("cuda-host")(scores, *args), op.reference(scores.double(), *args), strict=True
        ):
            assert torch.equal(got, want), (recent, sink, free)


@pytest.mark.parametrize(
    "lens, heads, kv_heads, slots, page_size, dtype",
    [
        ([1], 1, 1, 1, 1, torch.float32),  # one page of one token
        ([0, 255], 4, 2, 256, 16, torch.float16),  # one split
        ([601, 300, 16, 0], 6, 2, 601, 16, torch.bfloat16),  # several
        ([300, 133], 20, 1, 300, 1, torch.float16),  # more heads than a tile of the attention has
        ([130], 34, 17, 130, 32, torch.float32),  # and more than the merge has blocks
        ([2100, 77], 2, 1, 2100, 1, torch.bfloat16),  # so many pages that it is in turn
        ([1101, 100], 3, 1, 1101, 1050, torch.bfloat16),  # pages beyond a tile of scores
        ([n % 41 for n in range(45)], 2, 1, 41, 4, torch.float32),
        ([0, 0], 2, 1, 0, 16, torch.float32),  # no slots at all
    ],
)
@pytest.mark.parametrize("kept_in", [torch.float32, torch.float16])
def test_attend_and_select_is_its_three_parts(
    lens, heads, kv_heads, slots, page_size, dtype, kept_in, poisoned_outputs
):
    """Bit for bit, whichever block comes last: each launch takes the blocks in another order."""
    fused = OPS["attend_and_select"].impl("cuda-host")
    parts = ("decode_attention", "page_scores", "select_pages")
    one_by_one = in_turn(*(OPS[name].impl("cuda-host") for name in parts))
    q, k, v = attention_inputs(len(lens), heads, kv_heads, slots, 32, dtype)
    pages = -(-slots // page_size)
    for groups, use_max, count in (1, True, pages // 3 + 1), (kv_heads, False, pages + 2):
        args = q, k, v, ints(lens), None, page_size, count, 0.125
        written = torch.full((4, len(lens), heads, slots + 4), torch.nan, dtype=kept_in)
        want = *one_by_one(*args, written[3], groups, use_max, 1, 0), written[3]
        for logits in written[:3]:
            got = *fused(*args, logits, groups, use_max, 1, 0), logits
            for mine, theirs in zip(got, want, strict=True):
                assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_of_every_head_size(dim, dtype):
    """A query alone, and more columns than a block has: wide rows have fewer warps and stages."""

    def make(dtype, device):
        q, k, v = attention_inputs(2, 2, 1, 70, dim, dtype)
        *coded, words = codes_of(k, v)
        return q, *coded, ints([70, 33]), None, 1, dim**-0.5, None, words

    def append(dtype, device):
        q, *coded, lens, _, _, scale, _, words = make(dtype, device)
        q = q[:, None].expand(-1, 9, -1, -1).contiguous()
        return q, *coded, lens, None, None, None, 1, scale, None, words

    check(Case("decode_attention", f"codes-{dim}", make), "cuda-host", dtype, "cpu")
    check(Case("append_attention", f"codes-{dim}", append), "cuda-host", dtype, "cpu")
