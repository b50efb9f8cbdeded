"""Pace: how many drafts are worth checking, by what forwards take and how many drafts are right.

Drafting as a whole is judged too, by what it has won: tables and draws take time that no number of
drafts shows. After a trial that has lost, nothing is drafted or looked up for so long that trials
cost a small share of the run, and for twice as long after each further one.
"""

from __future__ import annotations

from collections.abc import Sequence

NEW = 0.2  # weight of a new forward in the running means of seconds
QUICK = 0.4  # the same, of one that was quicker than they are
OFTEN = 0.1  # the same, in the share of drafts that are right
AGAIN = 64  # forwards of trials after which what was not tried is forgotten, and so tried again
HOPE = 0.5  # of the mean seconds of a trial, for a forward at rest, where none is known
STEEP = 0.05  # of the seconds of one token, for each more, where known sizes do not say
TRIAL = 8  # forwards after which drafting is judged
KEPT = 0.5  # of a trial of one row that has won counts for the next: drafts are right in bursts
LOST = 0.5  # forwards; a trial of several rows that has lost more ends at once
SPARE = 50  # forwards of rest for each that a trial of several rows has lost
WORTH = 1.02  # times the tokens per second of forwards without drafts, for a trial to win
REST, LONGEST = 16, 256  # forwards without drafts after the first trial that lost, and at most
LOOK = 4  # forwards without drafts, to learn what they take
GLANCE = 1  # the same for one row: at the beginning, and behind LONGEST forwards of trials
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
        self._gained = self._spent = 0.0  # tokens of a row and seconds, see `_judge`
        self._several, self._tried = rows > 1, 0  # forwards of this trial
        self._judged = 0.0  # forwards that `_gained` and `_spent` are of
        self._left = LOOK if self._several else GLANCE  # of this rest
        self._busy = 0  # forwards since the last rest
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
        seconds = self._seconds if self._plain is None else {rows: self._plain} | self._seconds
        known = sorted(seconds.items())
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
            self._seconds[tokens] = _mean(before, seconds)
        for other in self._seconds:  # fewer tokens take no longer: the first forward is often slow
            if other < tokens:
                self._seconds[other] = min(self._seconds[other], seconds)
        if self._plain is not None and tokens > self._rows:
            self._plain = min(self._plain, seconds)
        if rested:
            return
        self._forwards += 1
        self._last[tokens] = self._forwards
        if drafts:
            self._expected += OFTEN * (expected - self._expected)
            self._right += OFTEN * (right - self._right)
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
                self._plain = _mean(before, seconds)
            if not self.rests:
                self._busy = 0
                self._hope()
            return
        self._busy += 1
        self._tried, self._judged = self._tried + 1, self._judged + 1
        self._gained, self._spent = self._gained + gained, self._spent + seconds
        plain = self._plain or HOPE * self._spent / self._judged
        lost = self._spent / plain - self._gained  # forwards without drafts
        if self._tried < TRIAL and not (self._several and self._plain and lost > LOST):
            return
        kept = 0.0
        if self._gained * plain > WORTH * self._spent:
            self._pause, kept = REST, 0.0 if self._several else KEPT
            self._left = GLANCE if self._busy >= LONGEST else 0
        elif self._plain is None:
            self._left = LOOK
        else:
            spared = int(SPARE * lost) if self._several else 0
            self._left = min(max(self._pause, spared), LONGEST)
            self._pause = min(2 * self._left, LONGEST)
        self._tried, self._judged = 0, kept * self._judged
        self._gained, self._spent = kept * self._gained, kept * self._spent


def _mean(before: float, seconds: float) -> float:
    """A running mean with a new forward: one that was held up says little."""
    if seconds < before:
        return before + QUICK * (seconds - before)
    return before + NEW * (min(seconds, 2 * before) - before)


def _slope(known: list[tuple[int, float]]) -> float:
    """Seconds of a token more. The smallest forward has no drafts, and any draft at all takes more
    than one more of them."""
    (low, fast), (high, slow) = known[min(1, len(known) - 1)], known[-1]
    if high > low:
        return max(slow - fast, 0.0) / (high - low)
    most = (fast - known[0][1]) / (low - known[0][0]) if len(known) > 1 else fast
    return max(min(STEEP * fast, most), 0.0)


def _guessed(known: list[tuple[int, float]], tokens: int) -> float:
    """Seconds of a forward that is not known: between its neighbours, or on from the last one."""
    below = [each for each in known if each[0] <= tokens]
    above = [each for each in known if each[0] >= tokens]
    if not below:
        if not above:
            return 1.0
        low, fast = above[0]
        return fast * (1 + STEEP * (tokens - 1)) / (1 + STEEP * (low - 1))
    if not above:
        return below[-1][1] + _slope(known) * (tokens - below[-1][0])
    (low, fast), (high, slow) = below[-1], above[0]
    return fast + (slow - fast) * (tokens - low) / max(high - low, 1)
