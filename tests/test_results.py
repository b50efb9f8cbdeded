"""The stored results of time and memory: pages show what the files have."""

import importlib
import re

import pytest

from kvcomp.ops.linear_rows import MAX_ROWS

pytest.importorskip("matplotlib")

from stored_results import README, RESULTS, ROOT, rows_of, table


@pytest.fixture(scope="module")
def reproduce():
    return importlib.import_module("reproduce")


def test_the_demo():
    shown = table(RESULTS, "| method | steps right |")
    measured = rows_of("demo")
    assert set(shown) == {row["method"] for row in measured}
    for row in measured:
        assert shown[row["method"]] == [
            f"{row['step_accuracy']:.1%}",
            f"{row['final_accuracy']:.0%}",
            f"{row['attended_ratio']:.0%}",
            f"{row['kv_bytes_peak'] / 2**20:.1f} MiB",
            f"{row['kv_bytes_read_per_token'] / 2**10:.0f} KiB",
        ]


@pytest.mark.parametrize("page", ["docs/vllm.md", "docs/results.md"])
def test_steps_of_an_engine(page):
    short, long = rows_of("engine/serving-512"), rows_of("engine/serving-6k")
    shown = table(ROOT / page, "| ms per step, 8 sequences |")
    assert list(shown) == [row["impl"] for row in short]
    for pair in zip(short, long, strict=True):
        ratios = ["" if x["impl"] == "vllm" else f" ({x['ratios']['vllm']:.2f}x)" for x in pair]
        assert shown[pair[0]["impl"]] == [
            f"{x['ms']:.1f}{ratio}" for x, ratio in zip(pair, ratios, strict=True)
        ]
    assert f"{long[-1]['ratios']['vllm']:.1f} times as fast as stock vLLM" in README.read_text()


def test_attention_of_an_engine():
    measured: dict[str, list[float]] = {}
    for row in rows_of("engine/attention"):
        measured.setdefault(row["shape"], []).append(row["ratios"]["vllm"])
    shown = table(ROOT / "docs" / "vllm.md", "| layer, sequences |")
    assert shown == {
        shape: [f"{x:.2f}x" if x < 9.995 else f"{x:.1f}x" for x in ratios[1:]]
        for shape, ratios in measured.items()
    }


def test_speed_of_several_tokens_in_a_forward():
    """Each ratio that docs/thinking.md shows, in the order of the tables."""
    names = ("stand-reasoner", "stand-reasoner-more", "stand-32k", "stand-eight-rows")
    names += ("stand-smollm2",)  # whose greedy rows are shown
    rows = [row for name in names for row in rows_of(f"thinking/{name}")]
    ratio = {(row["method"], row["rows"], row["context"]): f"{row['ratio']:.2f}" for row in rows}
    assert all(row["same_tokens"] == 1 for row in rows)
    page = ROOT / "docs" / "thinking.md"
    methods = ("full", "delta", "delta-1024", "lazy-eviction", "louiskv")
    reasoner = {(row["method"], row["context"]): row for row in rows if row["model"] == "reasoner"}
    want = [
        [f"{reasoner[each]['ratio']:.2f}" if each in reasoner else "" for each in columns]
        for columns in ([(method, n) for n in (512, 3903, 32768)] for method in methods)
    ]
    *shown, chunks = table(page, "| reasoner, method |").values()
    assert shown == want and chunks == [ratio["delethink", 1, 101], "", ""]
    prose = table(page, "| SmolLM2-135M, `Full` |").values()
    assert list(prose) == [
        [ratio.get(("full", count, n), "") for n in (56, 513, 6145)] for count in (1, 4, 8)
    ]


def test_votes_of_rows():
    rows = [x for x in rows_of("thinking/reasoner") if x["part"] == "votes"]
    shown = table(ROOT / "docs" / "thinking.md", "| contender | right |")
    assert list(shown) == [row["contender"] for row in rows]
    for row in rows:
        ratios = [f"{row[name]:.2f}" for name in ("tokens_ratio", "time_ratio")]
        assert shown[row["contender"]] == [f"{row['accuracy']:.0%}", *ratios, f"{row['path']:.0f}"]


def test_hints_on_a_model_that_writes_prose():
    rows = [row for row in rows_of("thinking/prose-words") if row["part"] == "hint"]
    shown = table(ROOT / "docs" / "thinking.md", "| answers of at most 256 tokens, greedy |")
    names = [name.replace("ConciseHint, ", "") for name in shown]
    assert names == [row["contender"].partition(" ")[2] for row in rows]
    assert list(shown.values()) == [
        [f"{row['tokens']:.0f}", f"{row['hints']:.1f}", f"{row['ended']} of {row['of']}"]
        for row in rows
    ]


def test_the_likelier_the_end_the_shorter_are_answers():
    rows = [row for row in rows_of("thinking/prose-words") if row["part"] == "stop"]
    means = [row["mean"] for row in rows if " bias " in row["contender"]]
    assert len(means) == 5 and means == sorted(means, reverse=True) and means[-1] < means[0]
    forced = rows[-1]
    low, high = map(int, forced["contender"].split()[-1].split(".."))
    assert low <= forced["shortest"] <= forced["longest"] <= high


def test_a_decode_step():
    names = {
        "transformers, its default cache": "hf dynamic",
        "transformers, StaticCache": "hf static",
    }
    measured = {(row["name"], row["tokens"]): row["ms"] for row in rows_of("decode/steps")}
    shown = table(RESULTS, "| tokens seen |")
    for label, cells in shown.items():
        name = names.get(label, label.partition(",")[0])
        for tokens, ms in zip((2048, 8192, 16384, 32768), cells, strict=True):
            assert ms.strip("*") == f"{measured[name, tokens]:.0f}", (label, tokens)
    assert len(shown) == len(measured) / 4
    for file in ("steps", "steps-smollm2-full"):
        row = next(
            r for r in rows_of(f"decode/{file}") if (r["name"], r["tokens"]) == ("full", 2048)
        )
        assert row["speedup"] >= 2.8
    said = f"a step of `full` takes {row['ms']:.1f} ms, against {row['stock_ms']:.1f} ms with"
    assert said in " ".join(RESULTS.read_text().split())


PEERS = {
    "kvcomp": "kvcomp",
    'kvcomp, kv="int8"': "kvcomp, int8",
    "kvcomp, run.compile()": "kvcomp, compiled",
    "transformers": "hf dynamic",
    "OpenVINO GenAI, u8 KV": "openvino, u8",
    "vLLM for CPUs": "vllm",
    "llama.cpp, f16 KV": "llama.cpp",
    "llama.cpp, f16 KV, flash attention": "llama.cpp, flash",
    "llama.cpp, q8_0 KV, flash attention": "llama.cpp, q8_0, flash",
}


def test_a_step_beside_other_engines():
    rows = [*rows_of("decode/peer-smollm2"), *rows_of("decode/peer-smollm2-batch")]
    assert all(row["agreed"] == 16 for row in rows)
    ms = {(row["name"], row["batch"], row["tokens"]): row["ms"] for row in rows}
    shown = table(RESULTS, "| step beside engines |")
    assert list(shown) == list(PEERS) and len(rows) == 5 * len(PEERS)
    places = (1, 512), (1, 2048), (1, 6144), (8, 512), (8, 2048)
    for label, cells in shown.items():
        assert cells == [f"{ms[(PEERS[label], *place)]:.1f}" for place in places], label
    shown = table(README, "| engine |")
    groups = {
        "kvcomp, eager and compiled": ("kvcomp", "kvcomp, compiled"),
        'kvcomp, kv="int8"': ("kvcomp, int8",),
        "transformers, its default cache": ("hf dynamic",),
        "vLLM for CPUs": ("vllm",),
        "OpenVINO GenAI, u8 KV": ("openvino, u8",),
    }
    settings = [name for name in PEERS.values() if name.startswith("llama.cpp")]
    for index, place in enumerate(((1, 2048), (1, 6144), (8, 2048))):
        for label, names in groups.items():
            want = ", ".join(f"{ms[(name, *place)]:.1f}" for name in names)
            assert shown[label][index] == want, (label, place)
        best = min(ms[(name, *place)] for name in settings)
        assert shown["llama.cpp, the faster of its settings"][index] == f"{best:.1f}"


def test_eight_long_sequences_beside_other_engines():
    rows = rows_of("decode/peer-smollm2-8x6k")
    assert all(row["agreed"] == 16 for row in rows)
    ms = {row["name"]: f"{row['ms']:.1f}" for row in rows}
    said = " ".join(RESULTS.read_text().split())
    for words in (
        f'kvcomp {ms["kvcomp"]} ms, with `kv="int8"` {ms["kvcomp, int8"]}, compiled'
        f" {ms['kvcomp, compiled']}; vLLM {ms['vllm']}, OpenVINO {ms['openvino, u8']},"
        f" transformers {ms['hf dynamic']}",
        f"Eager kvcomp is {float(ms['vllm']) / float(ms['kvcomp']):.2f} times as fast as vLLM",
    ):
        assert words in said


def test_the_readme():
    """A step at 32K tokens from the decode benchmark, the other columns from the demo."""
    demo = {row["method"]: row for row in rows_of("demo")}
    steps = {row["name"]: row["ms"] for row in rows_of("decode/steps") if row["tokens"] == 32768}
    shown = table(README, "| method | decode step at 32K tokens |")
    assert set(shown) == {name for name, row in demo.items() if name in steps}
    for name, cells in shown.items():
        row = demo[name]
        assert cells == [
            f"{steps[name]:.0f} ms",
            f"{row['kv_bytes_peak'] / 2**20:.1f} MiB",
            f"{row['attended_ratio']:.0%}",
            f"{row['step_accuracy']:.1%}",
        ]
    stock = re.search(
        r"(\d+) ms for the same step with `StaticCache`, and (\d+) ms with", README.read_text()
    )
    assert stock.groups() == (f"{steps['hf static']:.0f}", f"{steps['hf dynamic']:.0f}")


@pytest.mark.parametrize(
    "name, corner, least",
    [
        ("eight_bits", "| attention over 16K tokens |", {"128": 1.6, "64": 1.5}),
        ("eight_bits-avx2", "| attention over 16K tokens, AVX2 |", {"128": 1.4, "64": 1.3}),
    ],
)
def test_attention_over_eight_bits(name, corner, least):
    measured = {(row["shape"], row["impl"]): row for row in rows_of(f"ops/{name}")}
    variants = ("", " pages16 k=1024", " tokens k=1024")
    for heads, cells in table(ROOT / "docs" / "memory.md", corner).items():
        for variant, cell in zip(variants, cells, strict=True):
            wide, eight = (
                measured[f"B=1 {heads} n=16384{variant}", f"cpu {bits}"] for bits in (16, 8)
            )
            ratio = eight["ratios"]["16 bits"]
            assert cell == f"{wide['ms'] * 1e3:.0f} → {eight['ms'] * 1e3:.0f} µs, {ratio:.2f}x"
            assert ratio >= (1.3 if variant else least[heads.rpartition("x")[2]])


def test_steps_with_eight_bits():
    page = ROOT / "docs" / "memory.md"
    steps = {(row["name"], row["tokens"]): row for row in rows_of("decode/steps-smollm2-int8")}
    for name, cells in table(page, "| a step of SmolLM2-135M |").items():
        for tokens, cell in zip((2048, 8192), cells, strict=True):
            wide, eight = steps[name, tokens], steps[f"{name}@int8", tokens]
            assert cell == f"{wide['ms']:.1f} → {eight['ms']:.1f} ms"
            assert eight["kv_bytes"] <= 0.52 * wide["kv_bytes"]


def test_several_queries_per_step():
    measured = {(row["shape"], row["impl"]): row for row in rows_of("ops/append_attention")}
    for count, cells in table(RESULTS, "| queries per step |").items():
        for heads, cell in zip(("32/8x128", "16/8x128"), cells, strict=True):
            shape = f"B=1 {heads} n=16384 m={count}"
            kinds = ("one-by-one", "cpu", "cat-sdpa")
            shown = [f"{measured[shape, kind]['ms_min']:.1f}" for kind in kinds]
            assert cell == ", ".join(shown) + " ms"


@pytest.mark.parametrize("name", ["linear_rows", "linear_rows-fp16"])
def test_linear_layers_win_wherever_they_are_taken(name):
    steps = [
        row for row in rows_of(f"ops/{name}") if "all of" in row["shape"] and row["impl"] == "cpu"
    ]
    assert max(int(row["shape"].split()[0]) for row in steps) == MAX_ROWS
    assert all(row["ratios"]["torch-linear"] > 1.0 for row in steps)


def test_wide_heads():
    wide, narrow = (
        next(
            row["ms"]
            for row in rows_of("ops/wide-heads")
            if (row["impl"], row["shape"]) == ("cpu", f"B=1 {heads} n=16384")
        )
        for heads in ("8/2x512", "16/4x256")
    )
    assert wide < 1.1 * narrow
    assert f"takes {wide:.2f} and\n{narrow:.2f} ms" in RESULTS.read_text()


def test_linear_layers_of_a_step():
    measured = {(row["shape"], row["impl"]): row for row in rows_of("ops/linear_rows")}
    for rows, cells in table(RESULTS, "| rows of linear layers |").items():
        for model, cell in zip(("SmolLM2-135M, 269 MB", "Qwen3-0.6B, 1192 MB"), cells, strict=True):
            torchs, own = (
                measured[f"{rows} x all of {model}", impl] for impl in ("torch-linear", "cpu")
            )
            ratio = own["ratios"]["torch-linear"]
            assert cell == f"{torchs['ms']:.1f} → {own['ms']:.1f} ms, {ratio:.2f}x"
