"""The stored results, measured again and drawn, by the commands that they name.

    python benchmarks/reproduce.py --list                  # what there is, and how it was made
    python benchmarks/reproduce.py --out again             # all of it: hours
    python benchmarks/reproduce.py --smoke --out again     # all of it with toy inputs: minutes
    python benchmarks/reproduce.py decode families/tight --out again
    python benchmarks/reproduce.py --plots                 # the charts that README and docs show
    python benchmarks/reproduce.py --index                 # results/README.md

Every file in results/cpu says in its `meta` which command wrote it, so there is no second list to
keep. All commands are parsed before the first one runs. A result that fails does not stop the
others; the last lines name it, and the exit code is 1. One that needs a package which is not
installed is left out. Some need a model: `kvcomp get smollm2-135m` fetches it. With --smoke,
commands that toy inputs make equal run once. The files go to --out under their old names, with
their charts beside them; the stored ones stay as they are.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from drawing import STYLE, plt
from harness.record import NOT_INSTALLED
from overview import overview
from plot import CHARTS, plot, save

HERE = Path(__file__).parent
PAGES = [HERE.parent / "README.md", *(HERE.parent / "docs").glob("*.md")]
STORED = HERE / "results" / "cpu"
INDEX = HERE / "results" / "README.md"


@dataclass(frozen=True)
class Result:
    """A stored file, and how it came to be."""

    name: str  # folder and file, without .json
    words: tuple[str, ...]  # script and options, without --json
    facts: dict  # the file's meta

    @classmethod
    def read(cls, file: Path) -> Result:
        facts = json.loads(file.read_text())["meta"]
        name = file.relative_to(STORED).with_suffix("").as_posix()
        return cls(name, tuple(shlex.split(facts["command"])), facts)

    @property
    def environment(self) -> dict[str, str]:
        """What was set for it, such as KVCOMP_ISA."""
        return self.facts.get("environment", {})

    @property
    def command(self) -> str:
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*settings, *self.words])

    @property
    def has_charts(self) -> bool:
        return self.facts["benchmark"] in CHARTS

    def parse(self, *more: str) -> argparse.Namespace:
        """The command, with `more` options, as its script reads it today.

        Raises:
            SystemExit, ValueError: the script does not take it any more.
        """
        script, *options = self.words
        return import_module(script.removesuffix(".py")).parse([*options, *more])

    def work(self, *more: str) -> str:
        """What the command does with `more` options: the same for two that differ in words only."""
        options = vars(self.parse(*more)) | {"json": None}
        return f"{self.words[0]} {sorted(self.environment.items())} {sorted(options.items())}"

    def measure(self, out: Path, *more: str) -> int:
        """Run the command with `more` options; its exit code."""
        script, *options = self.words
        file = self.file(out)
        file.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / script), *options, *more, "--json", str(file)]
        return subprocess.run(command, env=os.environ | self.environment).returncode

    def file(self, folder: Path) -> Path:
        return folder / f"{self.name}.json"


def stored() -> dict[str, Result]:
    """By name. The demo's file is its own command's: `kvcomp demo --json FILE --plot FILE`."""
    results = map(Result.read, sorted(STORED.glob("*/*.json")))
    return {result.name: result for result in results}


def choose(names: Sequence[str]) -> list[Result]:
    """Those of these names or in folders of these names; all, if none is given.

    Raises:
        ValueError: nothing has such a name.
    """
    results = stored()
    known = {*results, *(name.partition("/")[0] for name in results)}
    if unknown := sorted(set(names) - known):
        raise ValueError(
            f"no stored result {', '.join(unknown)}; there are: {', '.join(sorted(known))}"
        )
    wanted = set(names) or known
    return [r for n, r in results.items() if n in wanted or n.partition("/")[0] in wanted]


def shown() -> set[str]:
    """The charts that a page shows, as paths in results/cpu: no others are stored."""
    text = "".join(page.read_text() for page in PAGES)
    return set(re.findall(r"results/cpu/([\w./-]+\.png)", text))


def redraw(result: Result) -> list[Path]:
    """The stored charts of a stored file, drawn anew."""
    place = result.file(STORED).parent
    with tempfile.TemporaryDirectory() as folder:
        drawn = plot(result.file(STORED), Path(folder))
        kept = [c for c in drawn if f"{place.name}/{c.name}" in shown()]
        return [Path(shutil.copy(chart, place)) for chart in kept]


def index() -> str:
    """The page that lists all stored results, by script."""
    lines = [
        "# Stored results",
        "",
        "`python benchmarks/reproduce.py --index` writes this page from the files. Each file holds",
        "machine, versions, commit and command under `meta`, then its rows. To repeat one:",
        "`python benchmarks/reproduce.py decode/steps --out DIR`. [Results](../../docs/results.md)",
        "discusses the figures; [demo.json](cpu/demo.json) is from `kvcomp demo --json`.",
    ]
    folder = None
    for result in stored().values():
        here, _, name = result.name.partition("/")
        if here != folder:
            folder, script = here, HERE / result.words[0]
            purpose = (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0]
            lines += ["", f"## {folder}", "", f"[`{script.name}`](../{script.name}): {purpose}", ""]
            lines += ["| file | command | CPU kernels, threads | date |", "|---|---|---|---|"]
        facts = result.facts
        link = f"[{name}](cpu/{result.name}.json)"
        where = f"{facts['cpu_isa']}, {facts['threads']}"
        lines.append(f"| {link} | `{result.command}` | {where} | {facts['date']} |")
    return "\n".join(lines) + "\n"


def repeat(results: list[Result], out: Path, *, smoke: bool) -> int:
    """Measure and draw; the number of results that failed."""
    unreadable = []
    for result in results:
        try:
            result.parse()
        except (SystemExit, ValueError) as error:
            unreadable.append(f"{result.name}: its script refuses {result.command}: {error}")
    if unreadable:
        print(*unreadable, sep="\n", file=sys.stderr)
        return len(unreadable)
    more = ["--smoke"] * smoke
    if smoke:
        results = list({result.work(*more): result for result in reversed(results)}.values())[::-1]
    left_out, failed = [], []
    for result in results:
        print(f"=== {result.name}: {result.command}", flush=True)
        code = result.measure(out, *more)
        if code == NOT_INSTALLED:
            left_out.append(result.name)
        elif code:
            failed.append(f"{result.name} (exit code {code})")
        elif result.has_charts:
            file = result.file(out)
            print(*plot(file, file.parent), sep="\n", flush=True)
    made = len(results) - len(left_out) - len(failed)
    print(f"=== {made} of {len(results)} results measured, in {out}")
    for what, names in (("left out, a package is missing", left_out), ("FAILED", failed)):
        if names:
            print(f"{what}: {', '.join(names)}", file=sys.stderr)
    return len(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="results or folders of results; default: all")
    add("--smoke", action="store_true", help="with --out: toy inputs, does everything run?")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--list", action="store_true")
    mode.add_argument("--plots", action="store_true")
    mode.add_argument("--index", action="store_true")
    mode.add_argument("--out", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    if options.smoke and options.out is None:
        parser.error("--smoke: expected --out DIR with it")
    try:
        chosen = choose(options.names)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print(*(f"{result.name:34} {result.command}" for result in chosen), sep="\n")
    elif options.index:
        INDEX.write_text(index())
        print(INDEX)
    elif options.plots:
        drawn = [chart for result in chosen if result.has_charts for chart in redraw(result)]
        with plt.rc_context(STYLE):
            save(overview(STORED), STORED / "overview.png")
        print(*drawn, STORED / "overview.png", sep="\n")
    else:
        return 1 if repeat(chosen, options.out, smoke=options.smoke) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
