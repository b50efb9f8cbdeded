"""Pace: whether checking drafts is a gain, measured while decoding."""

from __future__ import annotations

MEMORY = 0.9  # of the running means
TRIAL, PAUSE = 8, 64  # forwards with drafts before a verdict, and forwards without after a bad one


class Pace:
    """Running means of the seconds of a forward with and without drafts, and of the tokens won."""

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}
        self._tokens = 1.0
        self._tried = self._pause = 0

    def drafts(self) -> bool:
        """Whether the next forward may have drafts."""
        if self._pause:
            self._pause -= 1
        return not self._pause

    def note(self, drafted: bool, seconds: float, tokens: float) -> None:
        """A forward took so long and brought so many tokens to a row."""
        before = self._seconds.get(drafted, seconds)
        self._seconds[drafted] = min(MEMORY * before + (1 - MEMORY) * seconds, 2 * before)
        if not drafted:
            return
        self._tokens = tokens if not self._tried else MEMORY * self._tokens + (1 - MEMORY) * tokens
        self._tried += 1
        plain = self._seconds.get(False)
        slower = plain is not None and self._seconds[True] > plain * self._tokens
        if self._tried >= TRIAL and slower:
            self._pause, self._tried = PAUSE, 0
