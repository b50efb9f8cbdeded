"""Pace: how many drafts are worth checking, by what forwards take and how many drafts are right.

Drafting as a whole is judged too, by what it has won: tables and draws take time that no number of
drafts shows. After a trial that has lost, nothing is drafted or looked up for so long that trials
cost a small share of the run, and for twice as long after each further one.
"""

from __future__ import annotations

from collections.abc import Sequence

NEW = 0.2  # weight of a new forward in the running means
AGAIN = 64  # forwards of trials after which what was not tried is forgotten, and so tried again
HOPE = 0.5  # of the seconds of a larger forward, where no smaller one is known
STEEP = 0.1  # of a forward's seconds, for a token more, where only one size is known
TRIAL = 8  # forwards after which drafting is judged
LOST = 0.5  # forwards; a trial of several rows that has lost more ends at once
SPARE = 50  # forwards of rest for each that a trial of several rows has lost
WORTH = 1.02  # times the tokens per second of forwards without drafts, for a trial to win
REST, LONGEST = 16, 256  # forwards without drafts after the first trial that lost, and at most
LOOK = 4  # forwards without drafts, to learn what they take
SURELY = 1.05  # times the tokens per second without drafts that are expected, to check any
PRIOR = 2.0  # drafts of which as many as expected were right, before any was checked


class Pace:
    """Running means of the seconds of a forward by its number of tokens, and of the drafts that
    were right among those expected to be.

    Args:
        rows: of the batch. For several rows drafts win less, and a few forwards show that: they
            begin with a rest, end a trial sooner, and rest longer by what it has lost.
    """

    def __init__(self, rows: int = 1) -> None:
        self._seconds: dict[int, float] = {}
        self._last: dict[int, int] = {}  # number of the last forward with so many tokens
        self._forwards = 0
        self._rows = rows
        self._plain: float | None = None  # seconds of a forward at rest
        self._gained = self._spent = 0.0  # tokens of a row and seconds in this trial
        self._several, self._tried = rows > 1, 0  # forwards of this trial
        self._left = LOOK if self._several else 0  # of this rest
        self._hope()
        self._pause = REST

    @property
    def rests(self) -> bool:
        """Whether nothing should be drafted for the next forward."""
        return self._left > 0

    def drafts(self, rows: int, won: float, hopes: Sequence[float], each: int = 1) -> int:
        """The number of drafts that wins most per second.

        Args:
            rows: tokens of a forward without drafts.
            won: by such a forward.
            hopes: what the first draft wins, by what is expected of it, then the second, ...
            each: tokens that a draft adds to the forward.
        """
        if rows != self._rows:
            self._rows, self._plain = rows, None
        trust = self._right / self._expected
        best, most = 0, 0.0
        known = sorted(self._seconds.items())
        for drafts in range(len(hopes) + 1):
            won += trust * hopes[drafts - 1] if drafts else 0.0
            rate = won / _guessed(known, rows + drafts * each)
            if rate > most:
                best, most = drafts, rate if drafts else SURELY * rate
        return best

    def note(
        self,
        tokens: int,
        seconds: float,
        drafts: int,
        expected: float,
        right: float,
        gained: float,
    ) -> None:
        """A forward took so long, with drafting; so many of its drafts were right, and it gained so
        many tokens of a row, where one without drafts gains 1."""
        rested = self.rests
        self._judge(seconds, drafts, gained)
        before = self._seconds.get(tokens)
        if before is None:
            self._seconds[tokens] = seconds
        else:  # a forward that was held up says little
            self._seconds[tokens] = before + NEW * (min(seconds, 2 * before) - before)
        if rested:
            return
        self._forwards += 1
        self._last[tokens] = self._forwards
        if drafts:
            self._expected += NEW * (expected - self._expected)
            self._right += NEW * (right - self._right)
            self._drafted = self._forwards
        for other, last in list(self._last.items()):
            if self._forwards - last >= AGAIN:
                del self._seconds[other], self._last[other]
        if self._forwards - self._drafted >= AGAIN:
            self._hope()

    def _hope(self) -> None:
        """Forget how many drafts were right."""
        self._expected = self._right = PRIOR
        self._drafted = self._forwards  # the number of the last one with drafts

    def _judge(self, seconds: float, drafts: int, gained: float) -> None:
        """A forward more of a rest or of a trial."""
        if self.rests:
            self._left -= 1
            if not drafts:
                before = self._plain or seconds
                self._plain = before + NEW * (min(seconds, 2 * before) - before)
            if not self.rests:
                self._hope()
            return
        self._tried += 1
        self._gained, self._spent = self._gained + gained, self._spent + seconds
        plain = self._plain or HOPE * self._spent / self._tried
        lost = self._spent / plain - self._gained  # forwards without drafts
        if self._tried < TRIAL and not (self._several and self._plain and lost > LOST):
            return
        if self._gained * plain > WORTH * self._spent:
            self._pause = REST
        elif self._plain is None:
            self._left = LOOK
        else:
            spared = int(SPARE * lost) if self._several else 0
            self._left = min(max(self._pause, spared), LONGEST)
            self._pause = min(2 * self._left, LONGEST)
        self._tried, self._gained, self._spent = 0, 0.0, 0.0


def _slope(known: list[tuple[int, float]]) -> float:
    """Seconds of a token more. The smallest forward has no drafts, and any draft at all takes more
    than one more of them."""
    (low, fast), (high, slow) = known[min(1, len(known) - 1)], known[-1]
    return max(slow - fast, 0.0) / (high - low) if high > low else STEEP * fast


def _guessed(known: list[tuple[int, float]], tokens: int) -> float:
    """Seconds of a forward that is not known: between its neighbours, or on from the last one."""
    below = [each for each in known if each[0] <= tokens]
    above = [each for each in known if each[0] >= tokens]
    if not below:
        return HOPE * above[0][1] if above else 1.0
    if not above:
        return below[-1][1] + _slope(known) * (tokens - below[-1][0])
    (low, fast), (high, slow) = below[-1], above[0]
    return fast + (slow - fast) * (tokens - low) / max(high - low, 1)
