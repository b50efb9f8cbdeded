"""The log of a run: append-only JSONL, a line of settings and then one per finished chunk.

However a run ends, it can resume from its log, with the same settings only. One process at a time
writes to a log; a last line that a crash cut off is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

FINISHES = ("stop", "length")
START = b'{"kvcomp.delethink"'  # of the first line of every log
VERSION = 1


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


class Log:
    """An open, locked log.

    Attributes:
        settings: those of the run that began the log; None in a new log, until `begin`.
        reason: why that run fell back to text; None if it did not.
        chunks: (problem id, sample) -> its finished chunks, in order.

    Raises:
        ValueError: the file cannot be written, is no log, has a damaged line, or another process
            has it open. The file stays as it is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings: dict[str, Any] | None = None
        self.reason: str | None = None
        self.chunks: dict[tuple[str, int], list[Record]] = {}
        try:
            if self.path.exists() and not self.path.is_file():
                raise OSError(f"{self.path} is no regular file")
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (closed by close)
        except OSError as error:
            raise ValueError(f"kvcomp.delethink: cannot open the log: {error}") from error
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def begin(self, settings: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        """Write the settings of a new log and the reason for text, or compare with an old log's.

        Returns:
            the settings as the log has them.

        Raises:
            ValueError: the log was made with other settings; the message names them.
        """
        wanted = json.loads(json.dumps(settings))  # as they will be read back
        if self.settings is None:
            self._write({"kvcomp.delethink": VERSION, "settings": wanted, "reason": reason})
            self.settings, self.reason = wanted, reason
        changed = [
            f"{name} was {self.settings.get(name)!r} and is {wanted.get(name)!r}"
            for name in {**self.settings, **wanted}
            if self.settings.get(name) != wanted.get(name)
        ]
        if changed:
            raise ValueError(
                f"kvcomp.delethink: {self.path} is the log of another run ({'; '.join(changed)}):"
                " use another log, or the settings that it was begun with"
            )
        return self.settings

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
        self._write(record._asdict())

    def close(self) -> None:
        self._file.close()  # and with it goes the lock

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError as error:
            self._file.close()  # what was torn has to stay the last line
            raise RuntimeError(f"kvcomp.delethink: cannot write {self.path}: {error}") from error

    def _load(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"kvcomp.delethink: another process is writing to {self.path}"
            ) from None
        self._file.seek(0)
        data = self._file.read()
        if data[: len(START)] != START[: len(data)]:
            raise ValueError(f"kvcomp.delethink: {self.path} is not a log of Delethink traces")
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"kvcomp.delethink: {self.path}, line {number} is damaged: {error}"
                ) from error
        self._file.truncate(len(whole))

    def _take(self, line: Any) -> None:
        if self.settings is None:
            self.settings, self.reason = read_settings(line)
            return
        record = read_record(line)
        before = self.chunks.setdefault((record.id, record.sample), [])
        if record.chunk != len(before):
            raise ValueError(f"chunk {record.chunk} of {record.id!r} follows {len(before)} others")
        if before and before[-1].finish == "stop":
            raise ValueError(f"chunk {record.chunk} of {record.id!r} follows the end of its trace")
        before.append(record)


def read_settings(line: Any) -> tuple[dict[str, Any], str | None]:
    """Settings and reason of a log's first line.

    Raises:
        ValueError: a value that no run writes.
    """
    _require_keys(line, ("kvcomp.delethink", "settings", "reason"))
    version, settings, reason = line["kvcomp.delethink"], line["settings"], line["reason"]
    _require(type(version) is int and version == VERSION, "version", str(VERSION), version)
    _require(isinstance(settings, dict), "settings", "an object", settings)
    tokens = settings.get("tokens")
    _require(tokens in ("ids", "text"), "settings: tokens", "ids or text", tokens)
    _require(reason is None or isinstance(reason, str), "reason", "text or null", reason)
    return settings, reason


def read_record(line: Any) -> Record:
    """The chunk in a line of a log.

    Raises:
        ValueError: a value that no run writes.
    """
    _require_keys(line, Record._fields)
    record = Record(**line)
    for field in ("id", "hash"):
        value = getattr(record, field)
        _require(isinstance(value, str), field, "text", value)
    for field in ("sample", "chunk", "context", "drift"):
        value = getattr(record, field)
        _require(type(value) is int and value >= 0, field, "a number of at least 0", value)
    _require(record.finish in FINISHES, "finish", " or ".join(FINISHES), record.finish)
    _require(isinstance(record.ids, list), "ids", "a list of token ids", record.ids)
    for token in record.ids:
        _require(type(token) is int and token >= 0, "ids", "token ids", token)
    return record


def _require_keys(line: Any, keys: Collection[str]) -> None:
    if not isinstance(line, dict) or line.keys() != set(keys):
        got = sorted(line) if isinstance(line, dict) else line
        _require(False, "line", f"an object with {', '.join(keys)}", got)


def _require(condition: bool, field: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{field}: expected {expected}, got {textwrap.shorten(repr(got), 80)}")


def fingerprint(settings: Mapping[str, Any], ids: list[int]) -> str:
    """A short hash of everything that determines a chunk: settings and prompt."""
    text = json.dumps([settings, ids], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
