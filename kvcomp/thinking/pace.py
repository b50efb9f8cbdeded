"""Pace: how many drafts are worth checking, by what forwards take and how many drafts are right."""

from __future__ import annotations

from collections.abc import Sequence

NEW = 0.2  # weight of a new forward in the running means
AGAIN = 64  # forwards after which what has not been tried since is forgotten, and so tried again
HOPE = 0.5  # of the seconds of a wider forward, where no narrower one is known
PRIOR = 2.0  # drafts of which as many as expected were right, before any was checked


class Pace:
    """Running means of the seconds of a forward by its number of drafts, and of the drafts that
    were right among those expected to be.

    Args:
        most: drafts of a row in a forward, at most.
    """

    def __init__(self, most: int) -> None:
        self._seconds: list[float | None] = [None] * (most + 1)
        self._since = [0] * (most + 1)  # forwards since one with so many drafts
        self._expected = self._right = PRIOR

    def drafts(self, rows: int, hopes: Sequence[float]) -> int:
        """The number of drafts that wins most tokens per second.

        Args:
            rows: that decode; each gets a token in any case.
            hopes: the number of rows that take the first draft, by what the drafts say of
                themselves, then the second, ...
        """
        trust = self._right / self._expected
        best, most, won = 0, 0.0, float(rows)
        for drafts in range(len(hopes) + 1):
            won += trust * hopes[drafts - 1] if drafts else 0.0
            rate = won / self._guessed(drafts)
            if rate > most:
                best, most = drafts, rate
        return best

    def note(self, drafts: int, seconds: float, expected: float, right: float) -> None:
        """A forward with so many drafts of each row took so long; so many of all were right."""
        before = self._seconds[drafts]
        if before is None:
            self._seconds[drafts] = seconds
        else:  # a forward that was held up says little
            self._seconds[drafts] = before + NEW * (min(seconds, 2 * before) - before)
        if drafts:
            self._expected += NEW * (expected - self._expected)
            self._right += NEW * (right - self._right)
        self._since = [since + 1 for since in self._since]
        self._since[drafts] = 0
        for other, since in enumerate(self._since):
            if since == AGAIN:
                self._seconds[other] = None
        if min(self._since[1:]) == AGAIN:
            self._expected = self._right = PRIOR

    def _guessed(self, drafts: int) -> float:
        """Seconds of a forward: between those of its neighbours where it is not known."""
        known = [(n, seconds) for n, seconds in enumerate(self._seconds) if seconds is not None]
        below = [each for each in known if each[0] <= drafts]
        above = [each for each in known if each[0] >= drafts]
        if not below:
            return HOPE * above[0][1] if above else 1.0
        (low, fast), (high, slow) = below[-1], (above or below[-1:])[0]
        return fast + (slow - fast) * (drafts - low) / max(high - low, 1)
