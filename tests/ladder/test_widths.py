"""Which items go to fewer bits: against every assignment, and whatever the answers are."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.ladder.gallop import QUESTIONS
from halfstep.ladder.widths import Move, after, further, most_moves, moves_of, steps_from

#: Losses in whole numbers, so that sums are exact.
losses = st.lists(st.integers(0, 50), min_size=3, max_size=3).map(sorted)


@st.composite
def tables(draw, most=5, rising=True):
    """Items of three levels, fewer bytes at each; losses that rise, or anything, infinite ones too."""
    found = []
    for _ in range(draw(st.integers(1, most))):
        sizes = sorted(draw(st.sets(st.integers(1, 100), min_size=3, max_size=3)), reverse=True)
        some = (
            draw(losses)
            if rising
            else draw(st.lists(st.sampled_from([0, 3, 7, math.inf]), min_size=3, max_size=3))
        )
        found.append([(size, float(loss)) for size, loss in zip(sizes, [0, *some[1:]], strict=True)])
    return found


def total(table, levels, what):
    return sum(item[level][what] for item, level in zip(table, levels, strict=True))


def found_by(table, bound, asked=None):
    """What the search finds where losses add up and may reach ``bound``."""
    moves, start = moves_of(table), (0,) * len(table)

    def holds(levels, tried=()):
        if asked is not None:
            asked.append(levels)
        return total(table, levels, 1) <= bound

    count = most_moves(moves, lambda k: holds(after(start, moves[:k])))
    first = after(start, moves[:count])
    return moves, count, first, further(first, steps_from(table, first), holds)


@settings(deadline=None, max_examples=60)
@given(tables(), st.integers(0, 150))
def test_where_losses_add_up_the_best_saves_at_most_one_move_more(table, bound):
    moves, count, first, last = found_by(table, bound)
    within = [
        levels
        for levels in itertools.product(range(3), repeat=len(table))
        if total(table, levels, 1) <= bound
    ]
    best = min(total(table, levels, 0) for levels in within)
    one_more = moves[count].saved if count < len(moves) else 0
    assert total(table, last, 0) <= total(table, first, 0) <= best + one_more
    assert total(table, last, 1) <= bound


@settings(deadline=None, max_examples=60)
@given(tables(), st.integers(0, 150))
def test_no_step_is_left_that_would_hold(table, bound):
    *_, levels = found_by(table, bound)
    for step in steps_from(table, levels):
        if step.start == levels[step.item]:
            assert total(table, after(levels, [step]), 1) > bound


@settings(deadline=None, max_examples=60)
@given(
    tables(25, rising=False),
    st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    st.integers(0, 10**6),
)
def test_whatever_the_answers_questions_are_bounded_and_the_last_yes_is_the_answer(table, share, seed):
    moves, draw, known = moves_of(table), random.Random(seed).random, {(0,) * len(table): True}
    asked = []

    def holds(levels, tried=()):
        asked.append(levels)
        return known.setdefault(levels, draw() < share)

    start = (0,) * len(table)
    count = most_moves(moves, lambda k: holds(after(start, moves[:k])))
    assert len(asked) <= QUESTIONS["gallop"](len(moves))
    first = after(start, moves[:count])
    assert known[first] and (count == len(moves) or not known[after(start, moves[: count + 1])])
    asked.clear()
    steps, allowed = steps_from(table, first), 5
    last = further(first, steps, holds, lambda: len(asked) < allowed)
    assert len(asked) <= allowed and known[last]
    assert all(was <= now for was, now in zip(first, last, strict=True))
    asked.clear()
    further(first, steps, holds)
    assert len(asked) <= 2 * len(steps)


@settings(deadline=None, max_examples=60)
@given(tables(8, rising=False))
def test_moves_are_sorted_finite_and_each_follows_the_one_before(table):
    moves = moves_of(table)
    assert [move.rate for move in moves] == sorted(move.rate for move in moves)
    at = [0] * len(table)
    for move in moves:
        assert at[move.item] == move.start < move.level and move.saved > 0 and math.isfinite(move.loss)
        at[move.item] = move.level
    assert after((0,) * len(table), moves) == tuple(at)


def test_a_level_that_is_no_smaller_or_above_the_hull_is_passed_by():
    assert moves_of([[(8, 0.0), (8, 0.0), (2, 3.0)]]) == [Move(0, 0, 2, 6, 3.0)]
    assert moves_of([[(8, 0.0), (4, 9.0), (2, 3.0)]]) == [Move(0, 0, 2, 6, 3.0)]
    assert steps_from([[(8, 0.0), (4, 9.0), (2, 3.0)]], (0,)) == [
        Move(0, 0, 1, 4, 9.0),
        Move(0, 1, 2, 2, -6.0),
    ]
    assert moves_of([]) == steps_from([], ()) == []


def test_a_step_waits_for_the_one_before_it():
    table = [[(8, 0.0), (4, 5.0), (2, 5.0)], [(8, 0.0), (4, 1.0), (2, 9.0)]]
    asked = []

    def holds(levels, tried):
        asked.append((levels, [step.item for step in tried]))
        return levels[0] == 0  # the first item must stay

    assert further((0, 0), steps_from(table, (0, 0)), holds) == (0, 2)
    # Together with the step before it, which then fails alone: it is not asked about by itself.
    assert asked == [((0, 1), [1]), ((2, 1), [0, 0]), ((1, 1), [0]), ((0, 2), [1])]


@pytest.mark.parametrize("count", [0, 3])
def test_all_or_none(count):
    moves = [Move(i, 0, 1, 1, 1.0) for i in range(count)]
    assert most_moves(moves, lambda k: True) == count
    assert most_moves(moves, lambda k: False) == 0
