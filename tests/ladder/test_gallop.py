"""Searching a sorted list by questions, against the answers' own definition."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from halfstep.ladder.gallop import QUESTIONS, gallop, one_by_one, without_needless
from halfstep.ladder.partial import pruning


@given(st.integers(1, 300), st.integers(1, 320))
def test_gallop_finds_the_fewest_with_few_questions(count, needed):
    asked = []
    found = gallop(count, lambda k: asked.append(k) or k >= needed)
    assert found == (needed if needed <= count else None)
    assert found == one_by_one(count, lambda k: k >= needed)
    assert len(asked) == len(set(asked)) <= 2 * math.log2(min(needed, count)) + 3


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_whatever_the_answers_gallop_ends_where_one_fewer_does_not_hold(answers):
    found = gallop(len(answers), lambda k: answers[k - 1])
    if found is None:
        assert not answers[-1]
    else:
        assert answers[found - 1] and (found == 1 or not answers[found - 2])


def test_nothing_to_ask_of_an_empty_list():
    assert gallop(0, lambda k: True) is one_by_one(0, lambda k: True) is None


@given(st.integers(1, 12), st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)))
def test_what_is_left_holds_and_would_not_without_any_one(count, one, other):
    items = list(range(count))
    ways = [way & set(items) for way in (one, other)]

    def holds(kept, left_out=None):
        return any(way <= set(kept) for way in ways)

    kept = without_needless(items, holds)
    assert kept == sorted(kept) and holds(kept)
    assert not any(holds([x for x in kept if x is not item]) for item in kept)


@given(st.integers(1, 200), st.sets(st.integers(0, 199)))
def test_what_holds_without_most_is_found_with_few_questions(count, needed):
    items, asked = list(range(count)), []

    def holds(kept, left_out):
        asked.append(left_out)
        return needed & set(items) <= set(kept)

    kept = without_needless(items, holds)
    assert set(kept) == needed & set(items)
    assert len(asked) <= 2 * count
    if len(kept) == count:
        assert len(asked) == count  # nothing is lost where all are needed
    if not kept:
        assert len(asked) <= math.log2(count) + 1


@given(st.integers(1, 200), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(0, 10**6))
def test_no_answers_whatever_make_the_searches_ask_more_than_they_say(count, share, seed):
    asked, draw, allowed = [], random.Random(seed).random, pruning(count)

    def holds(*_):
        asked.append(1)
        return draw() < share

    for walk, search in (("gallop", gallop), ("one_by_one", one_by_one)):
        asked.clear()
        found = search(count, holds)
        assert len(asked) <= QUESTIONS[walk](count)
        asked.clear()
        without_needless(range(found or count), holds, lambda: len(asked) < allowed)
        assert len(asked) <= min(allowed, 2 * count)


def test_where_questions_run_out_what_is_kept_still_holds():
    items = list(range(100))

    def holds(kept, left_out):
        assert set(left_out) & set(kept) == set()
        asked.append(left_out)
        return {3, 50, 97} <= set(kept)

    asked = []
    kept = without_needless(items, holds, lambda: len(asked) < 5)
    assert len(asked) == 5 and {3, 50, 97} <= set(kept) and len(kept) < 100
