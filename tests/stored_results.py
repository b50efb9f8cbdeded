"""The stored results, and the tables of the pages."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")


ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "cpu"
RESULTS, README = ROOT / "docs" / "results.md", ROOT / "README.md"


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
