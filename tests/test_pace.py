"""Pace: the numbers of drafts that it chooses, by a clock that says what it is told."""

import random
import statistics

import pytest

from kvcomp.thinking.pace import Pace


def paced(seconds, hopes, right, forwards=400):
    """The drafts of the last forwards, which take seconds(drafts); a share of drafts is right."""
    pace, found = Pace(), []
    for _ in range(forwards):
        drafts = 0 if pace.rests else pace.drafts(1, 1.0, hopes)
        found.append(drafts)
        hoped = sum(hopes[:drafts])
        gained = 1 + right * hoped
        pace.note(1 + drafts, seconds(drafts), drafts, hoped, right * hoped, gained)
    return found[forwards // 2 :]


def test_as_many_drafts_as_pay_are_checked():
    sure, unsure = [0.95**n for n in range(1, 8)], [0.5**n for n in range(1, 8)]
    assert statistics.mode(paced(lambda drafts: 1 + 0.05 * drafts, sure, 1.0)) == 7
    assert statistics.mode(paced(lambda drafts: 1 + 0.2 * drafts, unsure, 1.0)) in (1, 2)
    assert statistics.mode(paced(lambda drafts: 1.0, unsure, 1.0)) == 7


def test_nothing_is_drafted_where_it_loses():
    """Few drafts are right, or forwards take too long."""
    sure = [0.95**n for n in range(1, 8)]
    for seconds, right in (
        (lambda drafts: 1 + drafts, 1.0),
        (lambda drafts: 1.2 + drafts / 9, 0.0),
    ):
        found = paced(seconds, sure, right)
        assert found.count(0) > 0.9 * len(found)


def test_drafts_are_tried_again():
    """When they begin to be right, and wherever that is."""
    sure, pace, found = [0.95**n for n in range(1, 8)], Pace(), []
    for forward in range(1200):
        drafts = 0 if pace.rests else pace.drafts(1, 1.0, sure)
        hoped, right = sum(sure[:drafts]), float(forward > 500)
        pace.note(1 + drafts, 1 + 0.1 * drafts, drafts, hoped, right * hoped, 1 + right * hoped)
        found.append(drafts)
    assert 0.1 * sum(found[:500]) < 0.06 * 500  # of the time
    assert statistics.mode(found[800:]) == 7


@pytest.mark.parametrize(("rows", "most"), [(1, 48), (4, 8)])
def test_drafting_that_takes_more_than_it_wins_rests(rows, most):
    """Whatever number of drafts is chosen: the time that choosing takes counts too. Several rows
    begin with a longer rest, and lose little by each trial."""
    sure, pace, drafted = [0.95**n for n in range(1, 8)], Pace(rows), []
    for _ in range(400):
        drafts = 0 if pace.rests else pace.drafts(rows, rows, sure)
        drafted.append(not pace.rests)
        hoped = sum(sure[:drafts])
        seconds = 1.0 if pace.rests else 2.0 + 0.1 * drafts
        pace.note(rows + drafts, seconds, drafts, hoped, 0.1 * hoped, 1 + 0.1 * hoped / rows)
    assert sum(drafted) <= most and any(drafted[100:])
    assert drafted[:2] == [False, rows == 1]


def test_drafts_that_are_right_in_bursts_go_on():
    """Seven of seven in three forwards of ten, by chance, else none. A trial of eight forwards may
    see few of these; those before it have won enough for it too."""
    hopes, rested, rates = [1.0] * 7, 0, []
    for seed in range(5):
        chance, pace, seconds, tokens = random.Random(seed), Pace(), 0.0, 0
        for _ in range(400):
            drafts = 0 if pace.rests else pace.drafts(1, 1.0, hopes)
            rested += pace.rests
            right = drafts if chance.random() < 0.3 else 0
            pace.note(1 + drafts, 1 + 0.09 * drafts, drafts, drafts, right, 1.0 + right)
            seconds, tokens = seconds + 1 + 0.09 * drafts, tokens + 1 + right
        rates.append(tokens / seconds)
    assert rested < 0.2 * 5 * 400
    assert statistics.mean(rates) > 1.7  # of 3.1 / 1.63 with seven drafts in each


def test_one_slow_forward_in_the_beginning_says_little():
    """The first of all, which is without drafts, takes ten times its time: a text in which no
    draft is right is not drafted for long."""
    hopes, pace, drafted = [0.95**n for n in range(1, 8)], Pace(), []
    for forward in range(600):
        drafts = 0 if pace.rests else pace.drafts(1, 1.0, hopes)
        drafted.append(not pace.rests)
        seconds = 10.0 if forward == 0 else 1.3 + 0.1 * drafts if drafted[-1] else 1.0
        pace.note(1 + drafts, seconds, drafts, sum(hopes[:drafts]), 0.0, 1.0)
    assert sum(drafted[300:]) < 100
