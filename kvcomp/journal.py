"""Journal: append-only JSONL, a line of settings and then one per finished piece of work.

However a run ends, it can resume from its journal, with the same settings only. One process at a
time writes to one; a last line that a crash cut off is dropped.
"""

from __future__ import annotations

import fcntl
import json
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self


class Journal:
    """An open, locked file.

    Attributes:
        settings: those of the run that began it; None in a new one, until `begin`.

    Raises:
        ValueError: the file cannot be written, is no such journal, has a damaged line, or another
            process has it open. The file stays as it is.
    """

    key: ClassVar[str]  # of the version in the first line, and where errors come from
    kind: ClassVar[str]  # what it is, in words
    version: ClassVar[int] = 1

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings: dict[str, Any] | None = None
        try:
            if self.path.exists() and not self.path.is_file():
                raise OSError(f"{self.path} is no regular file")
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (closed by close)
        except OSError as error:
            raise ValueError(f"{self.key}: cannot open the log: {error}") from error
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def take_first(self, line: Any) -> None:
        """Read the first line: sets `settings`, or raises ValueError."""
        raise NotImplementedError

    def take(self, line: Any) -> None:
        """Read another line, or raise ValueError."""
        raise NotImplementedError

    def begin(self, settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Write the first line of a new journal, or compare settings with an old one's.

        Args:
            more: other fields of the first line, which are not compared.

        Returns:
            the settings as the journal has them.

        Raises:
            ValueError: it was made with other settings; the message names them.
        """
        wanted = json.loads(json.dumps(settings))  # as they will be read back
        if self.settings is None:
            self.write({self.key: self.version, "settings": wanted, **more})
            self.settings = wanted
        changed = [
            f"{name} was {self.settings.get(name)!r} and is {wanted.get(name)!r}"
            for name in {**self.settings, **wanted}
            if self.settings.get(name) != wanted.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.key}: {self.path} is the log of another run ({'; '.join(changed)}):"
                " use another log, or the settings that it was begun with"
            )
        return self.settings

    def write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError as error:
            self._file.close()  # what was torn has to stay the last line
            raise RuntimeError(f"{self.key}: cannot write {self.path}: {error}") from error

    def close(self) -> None:
        self._file.close()  # and with it goes the lock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _load(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.key}: another process is writing to {self.path}") from None
        self._file.seek(0)
        data = self._file.read()
        start = b'{"' + self.key.encode() + b'"'
        if data[: len(start)] != start[: len(data)]:
            raise ValueError(f"{self.key}: {self.path} is not {self.kind}")
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = json.loads(line)
                (self.take_first if self.settings is None else self.take)(found)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self.key}: {self.path}, line {number} is damaged: {error}"
                ) from error
        self._file.truncate(len(whole))

    def read_first(self, line: Any, *more: str) -> dict[str, Any]:
        """Settings of a first line that has these fields and `more`."""
        require_keys(line, (self.key, "settings", *more))
        version, settings = line[self.key], line["settings"]
        good = type(version) is int and version == self.version
        require_field(good, "version", str(self.version), version)
        require_field(isinstance(settings, dict), "settings", "an object", settings)
        return settings


def require_keys(line: Any, keys: Collection[str]) -> None:
    """Raise ValueError unless a line is an object with these keys and no others."""
    if not isinstance(line, dict) or line.keys() != set(keys):
        got = sorted(line) if isinstance(line, dict) else line
        require_field(False, "line", f"an object with {', '.join(keys)}", got)


def require_field(condition: bool, field: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{field}: expected {expected}, got {textwrap.shorten(repr(got), 80)}")
