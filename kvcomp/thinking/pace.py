"""Pace: how many drafts are worth checking, by what forwards take and how many drafts are right."""

from __future__ import annotations

from collections.abc import Sequence

NEW = 0.2  # weight of a new forward in the running means
AGAIN = 64  # forwards after which what has not been tried since is forgotten, and so tried again
HOPE = 0.5  # of the seconds of a larger forward, where no smaller one is known
PRIOR = 2.0  # drafts of which as many as expected were right, before any was checked


class Pace:
    """Running means of the seconds of a forward by its number of tokens, and of the drafts that
    were right among those expected to be."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._last: dict[int, int] = {}  # number of the last forward with so many tokens
        self._forwards = self._drafted = 0  # and the number of the last one with drafts
        self._expected = self._right = PRIOR

    def drafts(self, rows: int, won: float, hopes: Sequence[float], each: int = 1) -> int:
        """The number of drafts that wins most per second.

        Args:
            rows: tokens of a forward without drafts.
            won: by such a forward.
            hopes: what the first draft wins, by what is expected of it, then the second, ...
            each: tokens that a draft adds to the forward.
        """
        trust = self._right / self._expected
        best, most = 0, 0.0
        known = sorted(self._seconds.items())
        for drafts in range(len(hopes) + 1):
            won += trust * hopes[drafts - 1] if drafts else 0.0
            rate = won / _guessed(known, rows + drafts * each)
            if rate > most:
                best, most = drafts, rate
        return best

    def note(self, tokens: int, seconds: float, drafts: int, expected: float, right: float) -> None:
        """A forward took so long; so many of its drafts were right."""
        self._forwards += 1
        before = self._seconds.get(tokens)
        if before is None:
            self._seconds[tokens] = seconds
        else:  # a forward that was held up says little
            self._seconds[tokens] = before + NEW * (min(seconds, 2 * before) - before)
        self._last[tokens] = self._forwards
        if drafts:
            self._expected += NEW * (expected - self._expected)
            self._right += NEW * (right - self._right)
            self._drafted = self._forwards
        for other, last in list(self._last.items()):
            if self._forwards - last >= AGAIN:
                del self._seconds[other], self._last[other]
        if self._forwards - self._drafted >= AGAIN:
            self._expected = self._right = PRIOR
            self._drafted = self._forwards


def _guessed(known: list[tuple[int, float]], tokens: int) -> float:
    """Seconds of a forward: between those of its neighbours where it is not known."""
    below = [each for each in known if each[0] <= tokens]
    above = [each for each in known if each[0] >= tokens]
    if not below:
        return HOPE * above[0][1] if above else 1.0
    (low, fast), (high, slow) = below[-1], (above or below[-1:])[0]
    return fast + (slow - fast) * (tokens - low) / max(high - low, 1)
