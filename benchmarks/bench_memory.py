"""Memory while decoding: does what a method evicts go back to the allocator?

    python benchmarks/bench_memory.py --json memory.json            # 32K tokens, two minutes or so
    python benchmarks/bench_memory.py --method full --method lazy-eviction --shape 32/8x128
    python benchmarks/bench_memory.py --smoke                       # a few seconds, for CI

Each method decodes through a `kvcomp.cache.KVCache` of a few layers with random q, K and V, the
call sequence that a model makes. Every so many tokens these are noted:

* bytes: on the CPU the storages of all tensors that are alive in the process, however they are
  held (the garbage collector lists them), less those alive before the cache was made; on a GPU
  `torch.cuda.memory_allocated`, likewise. Spare capacity of slabs, scratch and notes of the method
  are all in it, what a step allocates and frees again is not, and no cache or method is asked;
* RSS: the process's resident memory, less that before: a cross-check. The C library is asked first
  to give back what torch has freed, where it can be asked.
* tokens seen and kept, by the longest row.

The exit code is 1 if the bytes of a method that evicts still grow in the second half.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from harness.kv import add_kv, eight_bits, labels, parted
from harness.memory import Memory
from harness.record import header, meta, write_json
from kvcomp.cache import KVCache
from kvcomp.methods import METHODS, Method
from kvcomp.methods.eviction import Eviction
from ops.common import DTYPES, heads_of

DEFAULT = ("full", "lazy-eviction", "h2o", "tova", "random-eviction")
ROUNDS = 64  # different q, K and V, taken in turn


def decode(method: Method, kv: str, options: argparse.Namespace) -> Iterator[dict]:
    """Prefill and decode; what was noted, every `options.every` tokens."""
    heads, kv_heads, dim = options.shape
    generator = torch.Generator(options.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(options.batch, *shape, generator=generator, device=options.device)
        return x.to(DTYPES[options.dtype])

    prompt = random(heads, options.prompt, dim)
    steps = [(random(heads, dim) * 2, random(kv_heads, 1, dim)) for _ in range(ROUNDS)]
    scale = dim**-0.5
    memory, start = Memory(options.device), time.perf_counter()
    inv_freq = 1e4 ** (-torch.arange(0, dim, 2, device=options.device) / dim)
    cache = KVCache(method, options.layers, inv_freq=inv_freq, eight_bits=eight_bits(kv, dim))
    for layer in cache.layers:
        layer.append(prompt[:, :kv_heads], prompt[:, :kv_heads])
        cache.prefill(layer, prompt, scale)
    for step, (q, k) in zip(range(1, options.tokens + 1), itertools.cycle(steps), strict=False):
        for layer in cache.layers:
            layer.append(k, k)
            cache.attend(layer, q, scale)
        if step % options.every == 0:
            tensors, rss = memory.look()
            yield {
                "tokens": step,
                "bytes": tensors,
                "rss": rss,
                "seen": max(int(layer.logical_lens.max()) for layer in cache.layers),
                "kept": max(int(layer.seq_lens.max()) for layer in cache.layers),
                "seconds": time.perf_counter() - start,
            }


def summary(rows: Sequence[dict]) -> dict:
    """Peak, final, and growth in the second half, by a straight line through it."""
    late = rows[len(rows) // 2 :]
    tokens = [r["tokens"] / 1000 for r in late]
    middle, mean = sum(tokens) / len(late), sum(r["bytes"] for r in late) / len(late)
    spread = sum((x - middle) ** 2 for x in tokens)
    rise = sum((x - middle) * (r["bytes"] - mean) for x, r in zip(tokens, late, strict=True))
    return {
        "peak": max(r["bytes"] for r in rows),
        "final": rows[-1]["bytes"],
        "slope": rise / spread,  # bytes per 1000 tokens
        "grows": max(r["bytes"] for r in late[len(late) // 2 :])
        > max(r["bytes"] for r in late[: len(late) // 2]),
        "rss": rows[-1]["rss"],
        "kept": rows[-1]["kept"],
        "seconds": rows[-1]["seconds"],
    }


def line(name: str, facts: dict) -> str:
    mb = {key: f"{facts[key] / 1e6:8.2f} MB" for key in ("peak", "final", "rss")}
    return (
        f"{name:20} peak {mb['peak']}  final {mb['final']}  resident {mb['rss']}"
        f"  {facts['slope'] / 1e3:+9.2f} KB per 1K tokens  kept {facts['kept']:6}"
        f"  {facts['seconds']:.0f} s"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--method",
        action="append",
        choices=METHODS,
        metavar="NAME",
        help=f"once for each; default: {', '.join(DEFAULT)}; known: {', '.join(METHODS)}",
    )
    add("--tokens", type=int, default=32768, metavar="N", help="to decode")
    add("--every", type=int, metavar="N", help="tokens between looks; default: 64 looks")
    add("--budget", type=int, default=1024, metavar="B", help="most tokens that a method keeps")
    add("--prompt", type=int, default=512, metavar="N")
    add("--shape", type=heads_of, default=(8, 2, 64), metavar="Hq/HkvxD")
    add("--layers", type=int, default=2)
    add("--batch", type=int, default=1)
    add("--dtype", choices=DTYPES, default="bf16")
    add_kv(add)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=1, help="of a time that is not measured here; default: 1")
    add("--json", metavar="FILE")
    add("--smoke", action="store_true", help="600 tokens, a budget of 64, fewer methods")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.smoke:
        options.method = options.method or ["full", "lazy-eviction", "streaming-llm"]
        options.tokens, options.budget, options.prompt, options.layers = 600, 64, 32, 2
    options.method = options.method or list(DEFAULT)
    # Odd, so that the looks do not all fall right behind an eviction.
    options.every = options.every or max(1, (options.tokens // 64 - 1) | 1)
    if options.tokens < 8 * options.every:
        parser.error(f"--tokens must be at least eight times --every, {options.every}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    wanted = labels(options.method, options.kv)
    methods = {label: METHODS[parted(label)[0]].example(options.budget) for label in wanted}
    names = ("shape", "layers", "batch", "dtype", "tokens", "prompt", "budget")
    facts = meta("memory", options.device, **{name: getattr(options, name) for name in names})
    facts["methods"] = {name: repr(method) for name, method in methods.items()}
    print(header(facts), flush=True)
    rows, growing = [], []
    facts["summaries"] = {}
    for name, method in methods.items():
        noted = [{"method": name, **row} for row in decode(method, parted(name)[1], options)]
        facts["summaries"][name] = outcome = summary(noted)
        print(line(name, outcome), flush=True)
        rows += noted
        if isinstance(method, Eviction) and outcome["grows"]:
            growing.append(name)
    if options.json:
        write_json(options.json, facts, rows)
    gc.unfreeze()
    if growing:
        print(f"memory still grows in the second half: {', '.join(growing)}", file=sys.stderr)
    return 1 if growing else 0


if __name__ == "__main__":
    sys.exit(main())
