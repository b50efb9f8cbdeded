"""The stored results: pages show what the files have, and the files say how to make them anew."""

import importlib
import json
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from kvcomp.ops.linear_rows import MAX_ROWS

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "cpu"
RESULTS, README = ROOT / "docs" / "results.md", ROOT / "README.md"


@pytest.fixture(scope="module")
def reproduce():
    return importlib.import_module("reproduce")


def rows_of(name):
    return json.loads((STORED / f"{name}.json").read_text())["rows"]


def stored(name):
    """Whether there is such a file of real text: some are measured later than others."""
    return (STORED / f"language/{name}.json").exists()


def table(page, corner):
    """The rows below the header row that begins with `corner`, by their first cell."""
    lines = page.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(corner))
    cells = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return cells
        name, *rest = (cell.strip(" *") for cell in line.split("|")[1:-1])
        cells[re.sub("`", "", name)] = rest
    return cells


# --- figures --------------------------------------------------------------------------------------


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


def test_votes_of_rows():
    rows = [x for x in rows_of("thinking/reasoner") if x["part"] == "votes"]
    shown = table(ROOT / "docs" / "thinking.md", "| contender | right |")
    assert list(shown) == [row["contender"] for row in rows]
    for row in rows:
        ratios = [f"{row[name]:.2f}" for name in ("tokens_ratio", "time_ratio")]
        assert shown[row["contender"]] == [f"{row['accuracy']:.0%}", *ratios, f"{row['path']:.0f}"]


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
        ("eight_bits", "| attention over 16K tokens |", 1.7),
        ("eight_bits-avx2", "| attention over 16K tokens, AVX2 |", 1.1),
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
        dense = measured[f"B=1 {heads} n=16384", "cpu 8"]
        assert dense["ratios"]["16 bits"] >= least


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


EIGHT_BITS = [
    ("eight-bits", "| K and V of SmolLM2-135M |"),
    ("eight-bits-gemma", "| K and V of Gemma 3 270M |"),
]


@pytest.mark.parametrize("name, corner", [each for each in EIGHT_BITS if stored(each[0])])
def test_eight_bits_on_real_text(name, corner):
    from language.loss import summaries

    found = {each["method"]: each for each in summaries(rows_of(f"language/{name}"))}
    names = {
        "rounded to bf16": "bf16",
        "eight bits": "int8",
        "eight bits, kv_rotate=False": "int8-plain",
        "four bits, K turned": "int4",
    }
    shown = table(ROOT / "docs" / "memory.md", corner)
    assert list(shown) == list(names)
    for name, kind in names.items():
        got = found[f"full@{kind}"]
        assert shown[name] == [f"{got['kl']:.1e}", f"{got['top1']:.2%}", f"{got['d_nll']:+.4f}"]
    eight, plain, four = (found[f"full@{kind}"] for kind in ("int8", "int8-plain", "int4"))
    assert eight["kl"] <= 1e-3 and eight["top1"] >= 0.985 and abs(eight["d_nll"]) <= 0.004
    assert eight["kl"] < plain["kl"] < four["kl"] / 20


def test_eviction_at_equal_bytes():
    measured = {}
    for row in rows_of("families/tight"):
        measured.setdefault(row["method"], {})[row["bound"]] = f"{row['step_accuracy']:.1%}"
    shown = table(RESULTS, "| tokens a layer may keep |")
    for label, cells in shown.items():
        name = {"raas, its prompt not pinned": "raas, no pin"}.get(label, label)
        if "the better of two" in name:
            both = [measured["h2o"], measured["h2o, recent=window"]]
            best = {bound: max(m[bound] for m in both) for bound in both[0]}
        else:
            best = measured[name]
        assert [cell.strip("*") for cell in cells] == [best[b] for b in (144, 160, 192, 256, 320)]
    assert len(shown) == len(measured) - 3  # full, H2O's second setting, LazyEviction without H2


def test_the_study(reproduce):
    from accuracy.summary import summarize

    found = {(s.method, s.bound): s for s in summarize(rows_of("accuracy/study"))}
    assert found.pop(("full", "1")).steps.mean == 1
    shown = table(RESULTS, "| steps right, % |")
    assert len(found) == 3 * len(shown)
    for label, cells in shown.items():
        name, _, keeps = label.partition(", which keeps ")
        for bound, cell in zip(("1/4", "3/8", "1/2"), cells, strict=True):
            got = found[name, bound]
            assert not got.over and (got.keeps_all if keeps else not got.keeps_all)
            if got.reason is not None:
                assert cell == "–"
                continue
            low, high = 100 * got.steps.low, 100 * got.steps.high
            assert cell == f"{100 * got.steps.mean:.1f} ({low:.0f}–{high:.0f})", (label, bound)
    (pinned,) = summarize(rows_of("accuracy/pinned"))
    assert (pinned.bound, pinned.steps.mean) == ("1/4", 1)


def test_the_reasoner_in_eight_bits(reproduce):
    from accuracy.summary import summarize

    found = {(s.method, s.bound): s for s in summarize(rows_of("accuracy/eight-bits"))}
    shown = table(RESULTS, "| the reasoner in eight bits |")
    assert {f"{method}@int8" for method in shown} == {m for m, _ in found if "@" in m}
    for method, cells in shown.items():
        for bound, cell in zip(("3/8", "1/2"), cells, strict=True):
            bound = "1" if method == "full" else bound
            wide, eight = found[method, bound], found[f"{method}@int8", bound]
            steps = f"{100 * wide.steps.mean:.1f} → {100 * eight.steps.mean:.1f} %"
            held = f"{wide.peak_bytes / 2**20:.2f} → {eight.peak_bytes / 2**20:.2f} MiB"
            assert cell == f"{steps}, {held}"
            assert eight.steps.mean >= wide.steps.mean - 0.005


def test_the_reasoner_in_eight_bits_at_equal_bytes(reproduce):
    from accuracy.summary import summarize

    found = {(s.method, s.bound): s for s in summarize(rows_of("accuracy/eight-bits-equal"))}
    shown = table(RESULTS, "| steps right at equal bytes, % |")
    assert shown
    for method, cells in shown.items():
        places = [(name, b) for b in ("1/4", "3/8") for name in (method, f"{method}@int8")]
        for place, cell in zip(places, cells, strict=True):
            if cell == "–":
                assert found[place].reason
                continue
            steps = found[place].steps
            low, high = 100 * steps.low, 100 * steps.high
            assert cell == f"{100 * steps.mean:.1f} ({low:.0f}–{high:.0f})", place


LOSS = [  # of a stored file and a bound, the table
    ("loss-half", "| at half of the bytes |", "1/2"),
    ("loss-quarter", "| at a quarter |", "1/4"),
    ("2048", "| at a quarter of 2048 tokens |", "1/4"),
    ("2048-half", "| at half of 2048 tokens |", "1/2"),
    ("bf16", "| at a quarter in bf16 |", "1/4"),
    ("eight-bits-methods", "| at a quarter of the tokens |", "1/4"),
    ("gemma", "| Gemma 3 at half |", "1/2"),
    ("gemma", "| Gemma 3 at a quarter |", "1/4"),
]


@pytest.mark.parametrize("name, corner, bound", [each for each in LOSS if stored(each[0])])
def test_the_loss_on_real_text(reproduce, name, corner, bound):
    from language.loss import summaries

    facts = json.loads((STORED / f"language/{name}.json").read_text())["meta"]
    rows = summaries(rows_of(f"language/{name}"))
    same = 1e-6 if facts["settings"]["dtype"] == "float32" else 0.003  # of dense attention
    assert abs(next((s["d_nll"] for s in rows if s["method"] == "full"), 0)) < same
    found = {s["method"]: s for s in rows if s["bound"] == bound}
    shown = table(RESULTS, corner)
    assert {label.partition(",")[0] for label in shown} == {n.partition(",")[0] for n in found}
    for label, cells in shown.items():
        label, _, few = label.partition(", windows: ")
        method, _, keeps = label.partition(", which keeps ")
        got = found[method]
        assert got["windows"] == int(few or len(facts["settings"]["windows"]))
        low, high, held = *got["d_nll_interval"], got["peak_bytes"] / facts["context_bytes"]
        least, most = (100 * bound for bound in got["top1_interval"])
        limit = 1 if got["keeps_all"] else float(Fraction(bound))
        over = ", over the bound" if held > limit else ""
        assert bool(keeps) == got["keeps_all"]
        assert cells == [
            f"{got['d_nll']:+.3f} [{low:.3f}, {high:.3f}]",
            f"{got['d_nll reference']:+.3f}, {got['d_nll source']:+.3f}",
            f"{got['kl']:.3f}, {got['kl99']:.2f}",
            f"{100 * got['top1']:.1f} % [{least:.1f}, {most:.1f}]",
            f"{100 * held:.{0 if keeps else 1}f} %{over}",
        ]


def first_windows(count):
    """By method: the variants, and what they are compared with, over the same first windows."""
    from language.loss import summaries

    rows = [*rows_of("language/loss-quarter"), *rows_of("language/variants")]
    cut = {row["method"]: row | {"windows": row["windows"][:count]} for row in rows}
    return {summary["method"]: summary for summary in summaries(list(cut.values()))}


def test_the_pages_of_delta(reproduce):
    lines = (ROOT / "docs" / "delta.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| pages of DELTA |")) + 2
    found = first_windows(8)
    for line in lines[first : first + 5]:
        page, recent, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        method = f"delta:page_size={page}" + (f",recent={recent}" if recent != "2" else "")
        got = found[method]
        low, high = got["d_nll_interval"]
        assert f"page_size={page}, recent={recent}," in got["parameters"]
        assert cells == [
            f"{got['d_nll']:+.3f} [{low:.3f}, {high:.3f}]",
            f"{got['kl']:.3f}",
            f"{100 * got['top1']:.1f} %",
        ]


def test_the_windows_of_lazy_eviction(reproduce):
    found = first_windows(8)
    shown = table(ROOT / "docs" / "lazy_eviction.md", "| windows of LazyEviction |")
    assert len(shown) == 7
    for method, cells in shown.items():
        got = found[method]
        low, high = got["d_nll_interval"]
        assert cells == [
            f"{got['d_nll']:+.3f} [{low:.3f}, {high:.3f}]",
            f"{got['kl']:.3f}",
            f"{100 * got['top1']:.1f} %",
        ]


def test_the_sizes_of_louis_kv(reproduce):
    found = first_windows(8)
    for method, cells in table(ROOT / "docs" / "louis_kv.md", "| LouisKV's sizes |").items():
        got = found[method]
        low, high = got["d_nll_interval"]
        assert cells == [
            f"{100 * got['retrieval_rate']:.0f} %",
            f"{got['kl']:.3f}",
            f"{got['d_nll']:+.3f} [{low:.3f}, {high:.3f}]",
            f"{got['link_bytes'] / 1024:.0f} KiB",
        ]


BOUNDS = [  # the table, and the files of each of its columns
    ("| bound |", [("loss-half", "loss-quarter"), ("2048", "2048-half")]),
    ("| bound on Gemma 3 |", [("gemma",)]),
]


@pytest.mark.parametrize("corner, files", [each for each in BOUNDS if stored(each[1][0][0])])
def test_the_bounds_on_real_text(reproduce, corner, files):
    from language.loss import summaries

    found = {}
    for names in files:
        rows = [row for name in names for row in rows_of(f"language/{name}")]
        found[names] = {(s["method"], s["bound"]): s for s in summaries(rows)}
    for label, (*cells, held) in table(RESULTS, corner).items():
        what, limit = label.rsplit(": ", 1)
        method, share = what.split(" at ")
        within = []
        for names, cell in zip(found, cells, strict=True):
            got = found[names].get((method, share))
            other = found[names].get((limit.removeprefix("the link of "), share))
            if got is None or (limit.startswith("the link") and other is None):
                assert cell == "–", (label, names)
            elif limit.startswith("the link"):
                link, most = (each["link_bytes"] / 1024 for each in (got, other))
                assert cell == f"{link:.0f} of {most:.0f} KiB", (label, names)
                within.append(link < most)
            else:
                low, high = got["d_nll_interval"]
                few = f", {got['windows']} windows" if got["windows"] != 16 else ""
                assert cell == f"{got['d_nll']:+.3f} [{low:.3f}, {high:.3f}]{few}", (label, names)
                within.append(got["d_nll"] <= float(limit))
        assert held == ("yes" if all(within) else "no"), label


ANSWERS = [("answers", "| answered |"), ("late", "| answered late |")]


@pytest.mark.parametrize("name, corner", [each for each in ANSWERS if stored(each[0])])
def test_answers_inside_a_text(reproduce, name, corner):
    from accuracy.intervals import wilson

    rows = rows_of(f"language/{name}")
    found = {f"{row['method']} at {row['bound']}": row["kinds"] for row in rows}
    found["dense attention"] = found.pop("dense at 1")
    shown = table(RESULTS, corner)
    assert set(shown) == set(found)
    for label, cells in shown.items():
        counts = found[label].values()
        right, asked = map(sum, zip(*counts, strict=True))
        low, high = wilson(right, asked)
        total = f"{100 * right / asked:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
        assert cells == [*(f"{good} of {of}" for good, of in counts), total]


def test_facts_before_they_are_asked_for():
    measured = {row["method"]: row["facts"] for row in rows_of("language/facts")}
    shown = table(ROOT / "docs" / "lazy_eviction.md", "| tokens since the key |")
    methods = ("lazy-eviction", "h2o", "random-eviction")
    assert set(measured) == set(methods)
    assert list(shown) == [str(fact["since_fact"]) for fact in measured["lazy-eviction"]]
    for place, fact in enumerate(measured["lazy-eviction"]):
        held = [measured[method][place]["held"] for method in methods]
        shares = [f"{100 * share:.0f} %" for share in (fact["hit_lately"], *held)]
        assert shown[str(fact["since_fact"])] == [f"{fact['since_hit']:.0f}", *shares]


def test_free_running(reproduce):
    from accuracy.intervals import bootstrap

    facts = json.loads((STORED / "language/free.json").read_text())["meta"]["settings"]
    count = facts["tokens"] - facts["prompt"]
    found = {row["method"]: row for row in rows_of("language/free")}
    shown = table(RESULTS, "| free running |")
    assert set(shown) == set(found)
    for method, cells in shown.items():
        same, again = found[method]["same"], found[method]["repeated"]
        low, high = bootstrap(same)
        spread = f" [{low:.0f}, {high:.0f}]" if method != "full" else ""
        assert cells == [
            f"{sum(same) / len(same):.0f}{spread}",
            f"{same.count(count)} of {len(same)}",
            f"{sum(again) / len(again):.0%}".replace("%", " %"),
        ]


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "real-models.md"])
def test_a_real_model(reproduce, page):
    from language.loss import summaries

    losses = {
        (each["method"], each["bound"]): each["d_nll"]
        for name in ("loss-half", "loss-quarter")
        for each in summaries(rows_of(f"language/{name}"))
    }
    facts = {(row["method"], row["bound"]): row["kinds"] for row in rows_of("language/answers")}
    same = {row["method"]: row["same"] for row in rows_of("language/free")}
    shown = table(page, "| on a real model |")
    assert len(shown) == 5
    for method, cells in shown.items():
        bounds = [(method, "1/2"), (method, "1/4")]
        counts = [map(sum, zip(*facts[each].values(), strict=True)) for each in bounds]
        assert cells == [
            *(f"{losses[each]:+.3f}" for each in bounds),
            *(f"{right} of {asked}" for right, asked in counts),
            f"{sum(same[method]) / len(same[method]):.0f} of 448",
        ]


# --- how they were made ---------------------------------------------------------------------------


def test_stored_charts_are_those_that_a_page_shows(reproduce):
    charts = {chart.relative_to(STORED).as_posix() for chart in STORED.rglob("*.png")}
    assert charts == reproduce.shown()


def stored_names():
    return sorted(file.relative_to(STORED).as_posix()[:-5] for file in STORED.rglob("*/*.json"))


@pytest.mark.parametrize("name", stored_names())
def test_the_script_still_takes_the_stored_command(reproduce, name):
    result = reproduce.stored()[name]
    options = result.parse()
    given = [word[2:].replace("-", "_") for word in result.words if word.startswith("--")]
    assert set(given) <= set(vars(options)), "an option was read as another one"
    assert (ROOT / "benchmarks" / result.words[0]).stem == f"bench_{Path(name).parent}"


def test_the_index_lists_every_stored_result(reproduce):
    page = reproduce.INDEX.read_text()
    assert page == reproduce.index(), "python benchmarks/reproduce.py --index"
    for name in stored_names():
        assert f"(cpu/{name}.json)" in page


def test_charts_are_drawn_anew(reproduce, tmp_path, monkeypatch, capsys):
    names = ("families/lag", "accuracy/study", "decode/steps", "language/loss-quarter")
    for name in names:
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.json").write_bytes((STORED / f"{name}.json").read_bytes())
    monkeypatch.setattr(reproduce, "STORED", tmp_path)
    assert reproduce.main(["--plots"]) == 0
    drawn = [Path(line) for line in capsys.readouterr().out.split()]
    expected = {name for name in reproduce.shown() if name.startswith((*names, "overview"))}
    assert {chart.relative_to(tmp_path).as_posix() for chart in drawn} == expected
    assert len(expected) > 5 and all(chart.stat().st_size > 5000 for chart in drawn)


@pytest.fixture
def toy(reproduce, tmp_path, monkeypatch):
    """One stored result of a script that only writes down how it was called; and its folder."""
    (tmp_path / "bench_it.py").write_text(
        "import argparse, json, os, sys\n"
        "def parse(argv):\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('--part', nargs='+')\n"
        "    parser.add_argument('--smoke', action='store_true')\n"
        "    parser.add_argument('--json')\n"
        "    return parser.parse_args(argv)\n"
        "if __name__ == '__main__':\n"
        "    parse(None)\n"
        "    code = int(os.environ.get('IT_EXITS', 0))\n"
        "    facts = {'benchmark': 'it', 'command': 'bench_it.py --part x'}\n"
        "    called = {'words': sys.argv[1:], 'isa': os.environ.get('KVCOMP_ISA')}\n"
        "    if not code:\n"
        "        json.dump({'meta': facts, 'rows': [called]}, open(sys.argv[-1], 'w'))\n"
        "    raise SystemExit(code)\n"
    )
    stored = tmp_path / "stored"
    (stored / "toy").mkdir(parents=True)
    facts = {"benchmark": "it", "command": "bench_it.py --part x 'a b'"}
    facts["environment"] = {"KVCOMP_ISA": "scalar"}
    for name in ("first", "second"):
        (stored / f"toy/{name}.json").write_text(json.dumps({"meta": facts, "rows": []}))
    monkeypatch.setattr(reproduce, "STORED", stored)
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bench_it", raising=False)
    return tmp_path


@pytest.mark.parametrize("more", [[], ["--smoke"]])
def test_a_result_is_measured_by_its_own_command(reproduce, toy, more, capsys):
    assert reproduce.main(["--list"]) == 0
    assert "KVCOMP_ISA=scalar bench_it.py --part x 'a b'" in capsys.readouterr().out
    out = toy / "again"
    assert reproduce.main(["toy/first", "--out", str(out), *more]) == 0
    (called,) = json.loads((out / "toy/first.json").read_text())["rows"]
    assert called == {
        "words": ["--part", "x", "a b", *more, "--json", str(out / "toy/first.json")],
        "isa": "scalar",
    }
    assert not (out / "toy/second.json").exists()
    assert reproduce.main(["toy", "--out", str(out)]) == 0
    assert (out / "toy/second.json").exists()


def test_a_result_that_fails_does_not_stop_the_others(reproduce, toy, monkeypatch, capsys):
    facts = {"benchmark": "it", "command": "bench_it.py", "environment": {"IT_EXITS": "7"}}
    (toy / "stored/toy/bad.json").write_text(json.dumps({"meta": facts, "rows": []}))
    facts["environment"] = {"IT_EXITS": str(reproduce.NOT_INSTALLED)}
    (toy / "stored/toy/absent.json").write_text(json.dumps({"meta": facts, "rows": []}))
    assert reproduce.main(["--out", str(toy / "again")]) == 1
    said = capsys.readouterr()
    assert "2 of 4 results measured" in said.out
    assert "FAILED: toy/bad (exit code 7)" in said.err
    assert "left out, a package is missing: toy/absent" in said.err
    assert (toy / "again/toy/second.json").exists()


def test_a_command_that_its_script_refuses_is_found_before_anything_runs(reproduce, toy, capsys):
    facts = {"benchmark": "it", "command": "bench_it.py --gone 4"}
    (toy / "stored/toy/old.json").write_text(json.dumps({"meta": facts, "rows": []}))
    assert reproduce.main(["--out", str(toy / "again")]) == 1
    assert "toy/old: its script refuses bench_it.py --gone 4" in capsys.readouterr().err
    assert not (toy / "again").exists()


def test_an_unknown_result_is_refused(reproduce, capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["nothing", "--out", "again"])
    assert "no stored result nothing" in capsys.readouterr().err
