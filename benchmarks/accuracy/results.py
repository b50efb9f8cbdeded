"""The JSON of a study, from which a run that was interrupted goes on."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accuracy.summary import Row
from harness.record import write_json


class Cell(NamedTuple):
    """One batch of problems under one method at one bound."""

    method: str
    bound: str
    seed: int
    batch: int


@dataclass
class Results:
    """Rows of one study, in a file that is replaced as a whole by each new one.

    Attributes:
        path: None keeps them in memory only.
        settings: what all rows have in common.
        facts: of this run, for the file's meta.

    Raises:
        ValueError: the file is of something else, or of a study with other settings.
    """

    path: Path | None
    settings: dict[str, Any]
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        self.rows: list[Row] = []
        content = self.stored(self.path)
        if content is None:
            return
        before, now = content["meta"]["settings"], json.loads(json.dumps(self.settings))
        changed = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"kvcomp.accuracy: {self.path} is of a study with other settings"
                f" ({'; '.join(changed)}): use another file, or the settings it was begun with"
            )
        self.rows = content["rows"]

    @staticmethod
    def stored(path: Path | None) -> dict[str, Any] | None:
        """What a file holds of an earlier run; None: there is no file."""
        if path is None or not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            if content["meta"]["benchmark"] == "accuracy-study":
                return content
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"kvcomp.accuracy: {path} is something else than the result of a study")

    def done(self) -> set[Cell]:
        return {Cell(*(row[name] for name in Cell._fields)) for row in self.rows}

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            beside = self.path.with_name(self.path.name + ".part")
            write_json(beside, {**self.facts, "settings": self.settings}, self.rows)
            os.replace(beside, self.path)
