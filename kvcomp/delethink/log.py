"""The log of a run: a journal with a line per finished chunk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvcomp.journal import Journal, require_field, require_keys

FINISHES = ("stop", "length")


class Record(NamedTuple):
    """A finished chunk.

    Attributes:
        id, sample, chunk: problem, number of its trace, number of the chunk, both from 0.
        hash: `fingerprint` of settings and prompt.
        finish: "stop" or "length".
        context: all tokens in the context: prompt, carry and the new ones.
        drift: tokens that text did not carry over exactly.
        ids: the new tokens.
    """

    id: str
    sample: int
    chunk: int
    hash: str
    finish: str
    context: int
    drift: int
    ids: list[int]


class Log(Journal):
    """An open, locked log.

    Attributes:
        reason: why the run that began it fell back to text; None if it did not.
        chunks: (problem id, sample) -> its finished chunks, in order.

    Raises:
        ValueError: as `Journal`.
    """

    key = "kvcomp.delethink"
    kind = "a log of Delethink traces"

    def __init__(self, path: str | Path) -> None:
        self.reason: str | None = None
        self.chunks: dict[tuple[str, int], list[Record]] = {}
        super().__init__(path)

    def done(self, name: str, sample: int, wanted: str) -> list[Record]:
        """The finished chunks of a problem, whose hash must be `wanted`."""
        records = self.chunks.get((name, sample), [])
        if any(record.hash != wanted for record in records):
            raise ValueError(
                f"kvcomp.delethink: the prompt of problem {name!r} is not the one that"
                f" {self.path} was begun with"
            )
        return records

    def append(self, record: Record) -> None:
        self.write(record._asdict())

    def take_first(self, line: Any) -> None:
        settings = self.read_first(line, "reason")
        reason, tokens = line["reason"], settings.get("tokens")
        require_field(tokens in ("ids", "text"), "settings: tokens", "ids or text", tokens)
        good = reason is None or isinstance(reason, str)
        require_field(good, "reason", "text or null", reason)
        self.settings, self.reason = settings, reason

    def take(self, line: Any) -> None:
        record = read_record(line)
        before = self.chunks.setdefault((record.id, record.sample), [])
        if record.chunk != len(before):
            raise ValueError(f"chunk {record.chunk} of {record.id!r} follows {len(before)} others")
        if before and before[-1].finish == "stop":
            raise ValueError(f"chunk {record.chunk} of {record.id!r} follows the end of its trace")
        before.append(record)


def read_record(line: Any) -> Record:
    """The chunk in a line of a log.

    Raises:
        ValueError: a value that no run writes.
    """
    require_keys(line, Record._fields)
    record = Record(**line)
    for field in ("id", "hash"):
        value = getattr(record, field)
        require_field(isinstance(value, str), field, "text", value)
    for field in ("sample", "chunk", "context", "drift"):
        value = getattr(record, field)
        require_field(type(value) is int and value >= 0, field, "a number of at least 0", value)
    require_field(record.finish in FINISHES, "finish", " or ".join(FINISHES), record.finish)
    require_field(isinstance(record.ids, list), "ids", "a list of token ids", record.ids)
    for token in record.ids:
        require_field(type(token) is int and token >= 0, "ids", "token ids", token)
    return record


def fingerprint(settings: Mapping[str, Any], ids: list[int]) -> str:
    """A short hash of everything that determines a chunk: settings and prompt."""
    text = json.dumps([settings, ids], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
