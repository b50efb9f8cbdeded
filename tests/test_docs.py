"""What README and docs/ promise: code runs, commands parse, links lead somewhere, names hold."""

import dataclasses
import re
import runpy
import shlex
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from typer.main import get_command

from kvcomp import METHODS, cli
from kvcomp.hf import Report
from kvcomp.ops import HEAD_SIZES, OPS

ROOT = Path(__file__).parents[1]
README, INDEX = ROOT / "README.md", ROOT / "docs" / "README.md"
PAGES = [README, INDEX, *sorted(set(INDEX.parent.glob("*.md")) - {INDEX})]
COMMANDS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
CORE = {name: cls for name, cls in METHODS.items() if not cls.baseline}


def pages(chosen):
    return pytest.mark.parametrize("page", chosen, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, *languages):
    """The fenced blocks of a page in those languages as one text; lines keep their numbers."""
    lines, language = [], None
    for line in page.read_text().splitlines():
        fence = line.startswith("```")
        if fence:
            language = line[3:].strip() if language is None else None
        lines.append("" if fence or language not in languages else line)
    assert language is None, f"{page.name}: a block is not closed"
    return "\n".join(lines)


def run(page, folder, **names):
    """Run a page's Python; the names that it leaves. A traceback has the lines of the page."""
    file = folder / f"{page.stem}.py"
    file.write_text(blocks(page, "python"))
    return runpy.run_path(str(file), names, run_name="page")


@pytest.fixture(scope="module")
def preamble(tmp_path_factory, one_thread):
    """What the index page says all others start from: the model, its tokenizer, inputs."""
    return run(INDEX, tmp_path_factory.mktemp("preamble"))


# --- what a page shows ----------------------------------------------------------------------------


@pages([page for page in PAGES if "```python" in page.read_text()])
def test_the_python_of_a_page_runs(page, preamble, tmp_path, capsys):
    names = {} if page in (README, INDEX) else dict(preamble)
    with mock.patch.dict(METHODS):  # a page may add a method
        left = run(page, tmp_path, **names)
    shown = capsys.readouterr().out
    program = blocks(page, "python")
    assert "assert " in program or "tokens per step and layer" in shown, "it proves nothing"
    assert left["model"].config._attn_implementation != "kvcomp", "it leaves the model patched"


@pages(COMMANDS)
def test_the_commands_of_a_page_parse(page):
    programs = get_command(cli.app).commands
    for line in blocks(page, "sh", "bash", "console").replace("\\\n", " ").splitlines():
        for command in line.removeprefix("$ ").split(" && "):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch("[A-Z_]+=.*", words[0]):  # of the environment
                words.pop(0)
            if words[:1] == ["kvcomp"]:
                programs[words[1]].make_context(words[1], words[2:])
            elif words[:1] == ["python"] and words[1] != "-m":
                check_script(ROOT / words[1], words[2:])


def check_script(script, words):
    known = "".join(file.read_text() for file in script.parent.rglob("*.py"))
    assert script.is_file(), script
    for word in words:
        if word.startswith("--"):
            assert f'"{word}"' in known, f"{script.name} has no {word}"


@pages(COMMANDS)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def anchors(page):
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


# --- what must have its place ---------------------------------------------------------------------


def test_a_row_for_every_method_and_op():
    for name in CORE:
        assert rows(README, name), name
    for name in OPS:
        assert rows(INDEX.parent / "ops.md", name), name


@pytest.mark.parametrize("name", OPS)
def test_the_row_of_an_op_has_its_gpu_kernels(name):
    sources = {"CUDA": f"csrc/cuda/{name}.cu", "Triton": f"kvcomp/ops/triton/{name}.py"}
    kernels = [kind for kind, file in sources.items() if (ROOT / file).is_file()]
    (row,) = rows(INDEX.parent / "ops.md", name)
    assert row.endswith(f" | {', '.join(kernels) or '–'} |"), row


def test_the_index_names_every_page():
    for page in PAGES[2:]:
        assert f"]({page.name})" in INDEX.read_text(), page.name


@pytest.mark.parametrize("name", CORE)
def test_the_page_of_a_method_has_its_parameters(name):
    page = INDEX.parent / f"{name.replace('-', '_')}.md"
    for field in dataclasses.fields(CORE[name]):
        (row,) = rows(page, field.name)
        assert f"| `{field.default!r}` |" in row, row


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(CORE)))
def test_a_baseline_has_its_row_with_its_parameters(name):
    """In its own row `field=default`, or in the text over its table, which all in it share."""
    section = next(part for part in sections("baselines.md") if f"\n| `{name}` |" in part)
    shared = section.partition("\n|")[0]
    (row,) = rows(INDEX.parent / "baselines.md", name)
    for field in dataclasses.fields(METHODS[name]):
        said = row if f"`{field.name}=" in row else shared
        assert f"`{field.name}={field.default!r}`" in said, field.name
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    assert set(re.findall(r"`(\w+)=[^`]*`", row)) <= fields, row


def test_memory_explains_every_figure_of_a_report():
    text = (INDEX.parent / "memory.md").read_text()
    for field in dataclasses.fields(Report):
        assert f"`{field.name}`" in text, field.name


def rows(page, name):
    """The table rows whose first cell names it."""
    lines = page.read_text().splitlines()
    return [x for x in lines if x.startswith("| ") and f"`{name}`" in x.split("|")[1]]


def sections(name):
    return (INDEX.parent / name).read_text().split("\n## ")


@pytest.mark.parametrize("page", ["limits.md", "engines.md"])
def test_pages_list_the_head_sizes_that_are_compiled(page):
    *most, last = map(str, HEAD_SIZES)
    said = " ".join((INDEX.parent / page).read_text().split()).lower()
    assert f"sizes other than {', '.join(most)} and {last}" in said
