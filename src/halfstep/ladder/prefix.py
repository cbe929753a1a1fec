"""The fewest items of a sorted list that are enough: three small searches that only ask "does this set hold?"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

#: Whether the first k items are enough.
Holds = Callable[[int], bool]


def gallop(count: int, holds: Holds) -> int | None:
    """Ask for 1, 2, 4, ... items until one holds, then bisect between it and the last that did not.

    About 2 log2(k) + 2 questions. The answer k always holds and k - 1 does not, whatever ``holds`` is like; it is the
    smallest such k where more items never hurt.

    Returns:
        k, from 1 to ``count``; None if not even all of them hold.

    >>> gallop(100, lambda k: k >= 5)  # asks 1, 2, 4, 8, 6, 5
    5
    """
    low, high = 0, 1
    while high < count and not holds(high):
        low, high = high, min(2 * high, count)
    if high >= count:
        high = count
        if count == 0 or not holds(count):
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def one_by_one(count: int, holds: Holds) -> int | None:
    """Ask for 1, 2, 3, ... items until one holds: k questions.

    >>> one_by_one(100, lambda k: k >= 5)
    5
    """
    return next((k for k in range(1, count + 1) if holds(k)), None)


WALKS: dict[str, Callable[[int, Holds], int | None]] = {"gallop": gallop, "one_by_one": one_by_one}


def without_needless(items: Sequence[Item], holds: Callable[[list[Item], Item], bool]) -> list[Item]:
    """Try to do without each item, the last first; what remains holds, and would not without any one of them.

    The latter where taking an item away never helps.

    Args:
        items: which hold together.
        holds: whether a part of them does; it is told which item was left out.

    >>> without_needless([1, 2, 3, 4], lambda kept, left_out: {1, 3} <= set(kept))
    [1, 3]
    """
    kept = list(items)
    for item in reversed(items):
        fewer = [other for other in kept if other is not item]
        if holds(fewer, item):
            kept = fewer
    return kept
