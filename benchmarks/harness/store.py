"""The JSON of a long benchmark, row by row: a run that was interrupted goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from harness.record import write_json

Row = dict[str, Any]


class Store:
    """Rows, each known by what `key` fields say, in a file that each new one replaces as a whole.

    Args:
        path: None keeps them in memory only.
        settings: what all rows have in common; a file with others is refused.
        facts: of this run, for the file's meta; a file of another benchmark is refused.

    Raises:
        ValueError: the file is something else, or was begun with other settings.
    """

    def __init__(
        self, path: Path | None, key: tuple[str, ...], settings: dict[str, Any], facts: Row
    ) -> None:
        self.path, self.key, self.settings, self.facts = path, key, settings, facts
        self.rows: list[Row] = []
        content = stored(path, facts["benchmark"])
        if content is None:
            return
        before, now = content["meta"]["settings"], json.loads(json.dumps(settings))
        changed = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"kvcomp: {path} was begun with other settings ({'; '.join(changed)}): use"
                " another file, or those"
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


def stored(path: Path | None, benchmark: str) -> dict[str, Any] | None:
    """What the file holds of an earlier run of this benchmark; None: there is no file.

    Raises:
        ValueError: it holds something else.
    """
    if path is None or not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        meta = content["meta"]
        if meta["benchmark"] == benchmark and isinstance(meta["settings"], dict):
            return content
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"kvcomp: {path} is something else than a result of this benchmark ({benchmark})"
    )
