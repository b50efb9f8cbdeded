"""The switch walk: a short prompt of facts, a long chain of steps that keeps needing them.

The prompt lists, shuffled, two edges for each node, one for low and one for high::

    BA- ke 4 KE+ du 7 BA+ ba 3 ... from ba sum 8

``BA- ke 4`` reads: from node ``ba``, while the running sum is low (0 to 4), go to ``ke`` and add 4;
``BA+`` is the edge for a high sum (5 to 9). The answer walks. Each step writes source with switch,
target, weight, and the running sum mod 10::

    BA+ ba 3 1 BA- ke 4 5 KE+ ...

The sum sets the switch of the next step, so one slip sends the walk elsewhere, and the same fact
comes up again after long and uneven silence. (The parity of the sum would not do as a switch: it
follows from parities alone, so each fact would always have the same successor.) A quarter of the
nodes cannot be reached: their facts are distractors. The walk has no natural end; it is cut after
as many steps as are asked for.

Held-out problems: ``make_problem`` draws from the seed space ``(HELD_OUT, nodes, seed)``,
training from ``(TRAINING, ...)``. The first words differ, so no stream of random numbers is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvcomp.checks import require

HELD_OUT, TRAINING = 1, 2  # first word of every seed: keeps evaluation and training apart

NAMES = [c + v for c in "bdfghklmnprstvwz" for v in "aeio"]  # 64 node names
SOURCES = [name.upper() + switch for name in NAMES for switch in "-+"]
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
VOCABULARY = [
    *SPECIALS,
    "from",
    "sum",
    *(str(d) for d in range(10)),
    *NAMES,
    *SOURCES,
]
TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}

TOKENS_PER_STEP = 4  # source with switch, target, weight, sum

_DIGITS = {str(d) for d in range(10)}
_TARGETS = set(NAMES)
_SOURCES = set(SOURCES)


def random_graphs(
    rng: np.random.Generator, batch: int, nodes: int, live: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Draw graphs whose walks do not collapse into short loops.

    Returns ``target [batch, nodes, 2]``, ``weight [batch, nodes, 2]`` (last axis: the sum before
    the step is low, high) and the number of reachable nodes, which come first: ``live`` of them, or
    three quarters.

    Where a walk goes next depends on the state (node, sum) alone. With random edges the walk is in
    a loop after about ``sqrt(10 * nodes)`` steps. Here every state of the reachable part has
    exactly one predecessor, so the walk is a cycle of a random permutation, long as a rule: an
    edge arrives with one of five consecutive sums, and the two edges into a reachable node share
    the ten sums between them.
    """
    live = nodes - nodes // 4 if live is None else live
    target = rng.integers(0, nodes, (batch, nodes, 2))
    weight = rng.integers(0, 10, (batch, nodes, 2))
    edge = rng.random((batch, 2 * live)).argsort(axis=1)  # edges into node 0, 0, 1, 1, 2, ...
    first_sum = rng.integers(0, 10, (batch, live, 1)) + np.array([0, 5])  # of the five, by edge
    rows = np.arange(batch)[:, None]
    target[rows, edge // 2, edge % 2] = np.arange(2 * live) // 2
    weight[rows, edge // 2, edge % 2] = (first_sum.reshape(batch, -1) - 5 * (edge % 2)) % 10
    return target, weight, live


def is_high(total: int | np.ndarray) -> int | np.ndarray:
    """The switch: 1 for sums 5 to 9, 0 for sums 0 to 4. Elementwise for arrays."""
    return total // 5


@dataclass(frozen=True)
class Problem:
    """One switch walk: the facts as written in the prompt, the start, and the number of steps."""

    nodes: int
    steps: int
    edges: tuple[tuple[str, str, int], ...]  # (source with switch, target, weight), prompt order
    start: str
    start_sum: int
    tokens_per_step: int = TOKENS_PER_STEP

    @property
    def prompt(self) -> str:
        facts = (f"{source} {target} {weight}" for source, target, weight in self.edges)
        return f"{' '.join(facts)} from {self.start} sum {self.start_sum}"

    @property
    def facts(self) -> dict[str, tuple[str, int]]:
        """Source with switch -> (target, weight)."""
        return {source: (target, weight) for source, target, weight in self.edges}

    def walk(self) -> list[tuple[str, str, int, int]]:
        """The right answer as ``steps`` tuples (source with switch, target, weight, sum)."""
        facts, node, total, steps = self.facts, self.start, self.start_sum, []
        for _ in range(self.steps):
            source = source_token(node, total)
            node, weight = facts[source]
            total = (total + weight) % 10
            steps.append((source, node, weight, total))
        return steps

    def gold(self) -> str:
        """The right answer as text: ``steps * tokens_per_step`` words."""
        return " ".join(f"{s} {t} {w} {total}" for s, t, w, total in self.walk())


@dataclass(frozen=True)
class Grade:
    """Shares are in 0..1. A step is right when it follows from the prompt and the step before."""

    step_accuracy: float
    final_correct: bool  # every step is right
    steps: int  # steps graded: those that were asked for
    first_visit_accuracy: float | None  # over steps whose fact was not used before; None: no such


def source_token(node: str, total: int) -> str:
    """How a step names its source: the node in capitals, then "+" if the sum so far is high."""
    return node.upper() + "-+"[is_high(total)]


def make_problem(
    nodes: int = 16, steps: int = 512, seed: int = 0, live: int | None = None
) -> Problem:
    """A held-out problem, the same for the same arguments.

    ``nodes`` in 2..64 (two facts each), of which ``live`` (2..nodes; three quarters by default) can
    be reached; the facts of the others are distractors. The walk's period is at least half of the
    states (node, sum) that can be reached, so nearly all facts of reachable nodes come up.
    """
    if live is not None:
        require(2 <= live <= nodes, "kvcomp.reasoner: live", f"2 to nodes={nodes}", live)
    most = len(NAMES)
    require(2 <= nodes <= most, "kvcomp.reasoner: nodes", f"2 to {most}", nodes)
    require(steps >= 1, "kvcomp.reasoner: steps", "at least 1", steps)
    rng = np.random.default_rng([HELD_OUT, nodes, seed])
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:nodes]]
    while True:
        targets, weights, reachable = random_graphs(rng, 1, nodes, live)
        target, weight = targets[0].tolist(), weights[0].tolist()
        start_sum = int(rng.integers(10))
        if _period(target, weight, start_sum) >= 5 * reachable:  # of 10 * reachable states
            break
    edges = [
        (source_token(names[node], 5 * high), names[target[node][high]], weight[node][high])
        for node, high in ((i // 2, i % 2) for i in rng.permutation(2 * nodes).tolist())
    ]
    return Problem(nodes, steps, tuple(edges), names[0], start_sum)


def _period(target: list, weight: list, start_sum: int) -> int:
    """Steps until the walk from node 0 is back in its first state (node, sum)."""
    node, total, period = 0, start_sum, 0
    while period == 0 or (node, total) != (0, start_sum):
        high = is_high(total)
        node, total = target[node][high], (total + weight[node][high]) % 10
        period += 1
    return period


def grade(problem: Problem, text: str) -> Grade:
    """Grade an answer step by step; text beyond ``problem.steps`` steps is ignored.

    The source must follow from the target and sum of the step before *as written*, target and
    weight from the prompt, the sum from the sum before as written. A malformed or missing step is
    wrong, and so is the step after a malformed one, as nothing says what it should be; grading
    finds its feet again at the next word that is a source.
    """
    facts = problem.facts
    written = split_steps(text)[: problem.steps]
    written += [None] * (problem.steps - len(written))
    last: tuple[str, int] | None = problem.start, problem.start_sum  # None: was unreadable
    used: set[str] = set()
    right = first_right = firsts = 0
    for step in written:
        ok = False
        if last is not None:
            source = source_token(*last)
            if source in facts:
                target, weight = facts[source]
                ok = step == (source, target, weight, (last[1] + weight) % 10)
            if source not in used:
                firsts += 1
                first_right += ok
        right += ok
        if step is None:
            last = None
        else:
            used.add(step[0])
            last = step[1], step[3]
    first_visits = first_right / firsts if firsts else None
    return Grade(right / problem.steps, right == problem.steps, problem.steps, first_visits)


def split_steps(text: str) -> list[tuple[str, str, int, int] | None]:
    """Cut an answer at its source words into (source, target, weight, sum), None if malformed."""
    steps: list[tuple[str, str, int, int] | None] = []
    words, place = text.split(), 0
    while place < len(words):
        chunk = words[place : place + TOKENS_PER_STEP]  # behind it only a source is no bad step
        length = next((i for i, word in enumerate(chunk[1:], 1) if word in _SOURCES), len(chunk))
        steps.append(_read_step(chunk[:length]))
        place += length
    return steps


def _read_step(words: list[str]) -> tuple[str, str, int, int] | None:
    if len(words) != TOKENS_PER_STEP:
        return None
    source, target, weight, total = words
    if not (source in _SOURCES and target in _TARGETS and weight in _DIGITS and total in _DIGITS):
        return None
    return source, target, int(weight), int(total)
