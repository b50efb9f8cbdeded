"""The JSON of a part, row by row: a run that was interrupted goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from harness.record import write_json

Row = dict[str, Any]


class Store:
    """Rows, each known by what `key` fields say.

    Args:
        path: None keeps them in memory only.
        settings: what all rows have in common; a file with others is refused.
        facts: of this run, for the file's meta.

    Raises:
        ValueError: the file is something else, or was begun with other settings.
    """

    def __init__(
        self, path: Path | None, key: tuple[str, ...], settings: dict[str, Any], facts: Row
    ) -> None:
        self.path, self.key, self.settings, self.facts = path, key, settings, facts
        self.rows: list[Row] = []
        if path is None or not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            before = content["meta"]["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"kvcomp.language: {path} is no result of this benchmark") from None
        now = json.loads(json.dumps(settings))
        changed = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"kvcomp.language: {path} was begun with other settings ({'; '.join(changed)}):"
                " use another file, or those"
            )
        self.rows = content["rows"]

    def done(self) -> set[tuple]:
        return {tuple(row[name] for name in self.key) for row in self.rows}

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            beside = self.path.with_name(self.path.name + ".part")
            write_json(beside, {**self.facts, "settings": self.settings}, self.rows)
            os.replace(beside, self.path)
