"""The log of a run: append-only JSONL, a line of settings and then one per finished chunk.

Whatever ends a run, it can go on from here, with the same settings only. One process at a time
writes to a log; a line that was torn in the middle of a write is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

START = b'{"kvcomp.delethink"'  # of the first line of every log
VERSION = 1


class Record(NamedTuple):
    """A finished chunk.

    finish is "stop" or "length"; context counts all tokens that were in it, prompt and carry and
    the new ones, which are `ids`; drift counts tokens that text did not bring over exactly.
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
        settings: of the run that began it; None in a new one, until `begin`.
        reason: why that run fell back to text; None if it did not.
        chunks: (problem id, sample) -> its finished chunks, in order.

    Raises:
        ValueError: the file cannot be written, is no log, is damaged before its last line, or
            another process has it. The file is as before.
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

    def begin(self, settings: Mapping[str, Any], reason: str | None = None) -> None:
        """Write the settings of a new log, and why token ids are not exact; in an old one, refuse
        any others.

        Raises:
            ValueError: what is in the log was made with other settings; it names them.
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
            raise ValueError(
                f"kvcomp.delethink: {self.path} is something else than a log of traces"
            )
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"kvcomp.delethink: {self.path}, line {number} is damaged: {error}"
                ) from error
        self._file.truncate(len(whole))

    def _take(self, line: dict[str, Any]) -> None:
        if self.settings is None:
            if line["kvcomp.delethink"] != VERSION:
                raise ValueError(f"version {line['kvcomp.delethink']}, not {VERSION}")
            self.settings, self.reason = line["settings"], line["reason"]
            return
        record = Record(**line)
        before = self.chunks.setdefault((record.id, record.sample), [])
        if record.chunk != len(before):
            raise ValueError(f"chunk {record.chunk} of {record.id!r} follows on {len(before)}")
        before.append(record)


def fingerprint(settings: Mapping[str, Any], ids: list[int]) -> str:
    """A short hash of all that decides what a chunk says: settings and prompt."""
    text = json.dumps([settings, ids], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
