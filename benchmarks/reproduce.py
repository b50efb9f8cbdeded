"""The stored results, measured again and drawn, by the commands that they name.

    python benchmarks/reproduce.py --list                  # what there is, and how it was made
    python benchmarks/reproduce.py --out again             # all of it: hours
    python benchmarks/reproduce.py decode accuracy-tight --out again
    python benchmarks/reproduce.py --plots                 # the charts that README and docs show

Every file in results/cpu says in its `meta` which command wrote it, so that there is no second list
to keep. The files go to --out under their old names, with all their charts; the stored ones stay.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path

from drawing import STYLE, plt
from overview import overview
from plot import CHARTS, plot, save

HERE = Path(__file__).parent
PAGES = [HERE.parent / "README.md", *(HERE.parent / "docs").glob("*.md")]
STORED = HERE / "results" / "cpu"


@dataclass(frozen=True)
class Result:
    """A stored file, and how it came to be."""

    name: str
    words: tuple[str, ...]  # script and options, without --json
    environment: dict[str, str]  # that was set for it, such as KVCOMP_ISA
    has_charts: bool

    @classmethod
    def read(cls, file: Path) -> Result:
        facts = json.loads(file.read_text())["meta"]
        words = tuple(shlex.split(facts["command"]))
        has_charts = facts["benchmark"] in CHARTS
        return cls(file.stem, words, facts.get("environment", {}), has_charts)

    def __str__(self) -> str:
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return f"{self.name:26} {shlex.join([*settings, *self.words])}"

    def measure(self, out: Path) -> Path:
        script, *options = self.words
        file = out / f"{self.name}.json"
        command = [sys.executable, str(HERE / script), *options, "--json", str(file)]
        subprocess.run(command, env=os.environ | self.environment, check=True)
        return file


def stored() -> dict[str, Result]:
    """By name. The demo's file is its own command's: `kvcomp demo --json FILE --plot FILE`."""
    files = sorted(set(STORED.glob("*.json")) - {STORED / "demo.json"})
    return {file.stem: Result.read(file) for file in files}


def shown() -> set[str]:
    """The file names of the charts that a page shows: no others are stored."""
    text = "".join(page.read_text() for page in PAGES)
    return set(re.findall(r"results/cpu/([\w.-]+\.png)", text))


def redraw(result: Result) -> list[Path]:
    """The stored charts of a stored file, drawn anew."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = [c for c in plot(STORED / f"{result.name}.json", Path(folder)) if c.name in shown()]
        return [Path(shutil.copy(chart, STORED)) for chart in drawn]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of stored results; default: all")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--list", action="store_true")
    mode.add_argument("--plots", action="store_true")
    mode.add_argument("--out", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    results = stored()
    if unknown := sorted(set(options.names) - set(results)):
        parser.error(f"no stored result {', '.join(unknown)}; there are: {', '.join(results)}")
    chosen = [results[name] for name in options.names or results]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    if options.plots:
        drawn = [chart for result in chosen if result.has_charts for chart in redraw(result)]
        with plt.rc_context(STYLE):
            save(overview(STORED), STORED / "overview.png")
        print(*drawn, STORED / "overview.png", sep="\n")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for result in chosen:
        print(f"=== {result}", flush=True)
        file = result.measure(options.out)
        if result.has_charts:
            print(*plot(file, options.out), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
