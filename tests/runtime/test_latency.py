"""Races: who runs when, and who leaves."""

import pytest

from halfstep.errors import ArgumentError
from halfstep.ladder.heats import not_fastest, slower_or_faster
from halfstep.runtime.latency import STATED, in_turns


def test_who_leaves_is_run_no_more_and_the_race_ends_with_the_last_of_them():
    runs, asked = [], []

    def leave(times):
        asked.append({name: len(series) for name, series in times.items()})
        return ["c"] if len(asked) == 1 else ["c", "d"]

    contestants = {name: lambda name=name: runs.append(name) for name in "abcd"}
    times = in_turns(contestants, rounds=31, warmup=1, leave=leave)
    assert {name: len(series) for name, series in times.items()} == {"a": 14, "b": 14, "c": 7, "d": 14}
    assert asked == [dict.fromkeys("abcd", 7), {"a": 14, "b": 14, "c": 7, "d": 14}]
    assert runs.count("c") == 2 * (1 + STATED)
    assert all(time >= 0 for series in times.values() for time in series)


def test_of_many_rounds_a_quarter_is_run_by_all():
    asked = []
    in_turns(dict.fromkeys("abc", int), rounds=80, leave=lambda times: asked.append(len(times["c"])) or ())
    assert asked == [20, 40, 60]
    with pytest.raises(ArgumentError, match="got 2, needed at least 3"):
        in_turns({"a": int}, rounds=2)


BASE, TWIN = [10.0, 11.0] * 4, [11.0, 10.0] * 4


@pytest.mark.parametrize(
    ("file", "clear"),
    [
        ([11.5] * 8, True),  # slower in every round
        ([9.5] * 8, True),  # faster
        ([9.5] * 7 + [99.0], False),  # faster in seven of eight
        ([9.5] * 7, True),  # in seven of seven
        ([9.5] * 6, False),  # too few rounds, whatever they say
        ([10.5] * 8, False),  # the mean of both
    ],
)
def test_a_sign_is_clear_where_rounds_agree(file, clear):
    assert slower_or_faster(BASE, TWIN, file) == [clear]


def test_only_what_may_be_the_fastest_goes_on():
    fast, faster, slow = [8.0] * 8, [7.0, 8.5] * 4, [12.0] * 8
    assert not_fastest(BASE, TWIN, fast, faster, slow) == [False, False, True]
    faster = [7.0] * 8
    assert not_fastest(BASE, TWIN, fast, faster, slow) == [True, False, True]
    assert not_fastest(BASE, TWIN, fast[:7], faster, slow) == [True, False, True]  # left before


def test_nobody_is_faster_than_the_base():
    assert not_fastest(BASE, TWIN, [10.4, 10.6] * 4, [10.6] * 8) == [False, True]
