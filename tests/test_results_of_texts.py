"""The stored results of real text, the reasoner and answers: pages show what the files have."""

import importlib
import json
from fractions import Fraction

import pytest

pytest.importorskip("matplotlib")

from stored_results import README, RESULTS, ROOT, STORED, rows_of, stored, table


@pytest.fixture(scope="module")
def reproduce():
    return importlib.import_module("reproduce")


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
    ("loss-three-eighths", "| at three eighths |", "3/8"),
    ("2048", "| at a quarter of 2048 tokens |", "1/4"),
    ("2048-half", "| at half of 2048 tokens |", "1/2"),
    ("6144", "| at a quarter of 6144 tokens |", "1/4"),
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


def test_the_first_page_of_delta(reproduce):
    from language.loss import summaries

    found = {row["method"]: row for row in summaries(rows_of("language/6144"))}
    shown = table(ROOT / "docs" / "delta.md", "| DELTA at 6144 tokens |")
    assert len(shown) == 2
    for label, cells in shown.items():
        got = found["delta:sinks=0" if "sinks=0" in label else "delta"]
        low, high = got["d_nll_interval"]
        loss = f"{got['d_nll']:+.3f} [{low:.3f}, {high:.3f}]"
        assert cells == [loss, f"{100 * got['top1']:.1f} %"]


def test_the_pages_of_delta(reproduce):
    lines = (ROOT / "docs" / "delta.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| pages of DELTA |")) + 2
    found = first_windows(8)
    for line in lines[first : first + 5]:
        page, recent, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        method = f"delta:page_size={page}" + (f",recent={recent}" if recent != "2" else "")
        method += ",sinks=0"
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
    ("| bound |", [("loss-half", "loss-quarter"), ("2048", "2048-half"), ("6144",)]),
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


def premises_of(name):
    """What the table says of a file."""
    rows = rows_of(f"language/{name}")

    def mean(pick):
        return sum(map(pick, rows)) / len(rows)

    def percent(pick):
        return f"{100 * mean(pick):.1f} %"

    def recurrence(row):
        return next(each for each in row["recurrence"] if each["alpha"] == 0.001)

    def delta(what):
        return percent(lambda row: row["delta"][what])

    def carried(count):
        found = [each["carry"] for each in rows[0]["carry"]].index(count)
        return f"{mean(lambda row: row['carry'][found]['nll']):.3f}"

    steps = recurrence(rows[0])["of_tokens"]
    return [
        *map(delta, ("caught", "own", "newest", "random")),
        percent(lambda row: recurrence(row)["recur_after_absence"]),
        f"{mean(lambda row: recurrence(row)['longest_80']):.0f} of {steps} steps",
        f"{mean(lambda row: row['similarity']['cosine']):.3f}",
        percent(lambda row: row["similarity"]["trigger_rate"]["0.85"]),
        percent(lambda row: row["similarity"]["overlap"]),
        *map(carried, (64, 256, None)),
    ]


def test_the_premises_of_the_papers():
    shown = table(ROOT / "docs" / "real-models.md", "| premises in figures |")
    columns = map(premises_of, ("premises", "premises-2048", "premises-gemma"))
    assert list(shown.values()) == [list(row) for row in zip(*columns, strict=True)]


ANSWERS = [
    ("answers", "| answered |"),
    ("late", "| answered late |"),
    ("late-2000", "| answered 2000 tokens later |"),
]


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
