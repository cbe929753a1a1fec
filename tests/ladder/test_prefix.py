"""Searching a sorted list by questions, against the answers' own definition."""

import math

from hypothesis import given
from hypothesis import strategies as st

from halfstep.ladder.prefix import gallop, one_by_one, without_needless


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
    assert holds(kept)
    assert not any(holds([x for x in kept if x is not item]) for item in kept)
