"""The fewest items of a sorted list that are enough: small searches that only ask "does this set hold?".

Each has a bound on its questions that holds whatever the answers are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

#: Whether the first k items are enough.
Holds = Callable[[int], bool]


def gallop(count: int, holds: Holds) -> int | None:
    """Ask for 1, 2, 4, ... items until one holds, then bisect between it and the last that did not.

    About 2 log2(k) + 2 questions, and never more than :data:`QUESTIONS` says. The answer k always holds and k - 1 does
    not, whatever ``holds`` is like; it is the smallest such k where more items never hurt.

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

#: How many questions each walk asks at most of so many items.
QUESTIONS: dict[str, Callable[[int], int]] = {
    "gallop": lambda count: max(1, 2 * math.ceil(math.log2(count))) if count else 0,
    "one_by_one": lambda count: count,
}


def without_needless(
    items: Sequence[Item],
    holds: Callable[[list[Item], list[Item]], bool],
    may_ask: Callable[[], bool] = lambda: True,
) -> list[Item]:
    """Try to do without items, the last first: one, and twice as many each time that it holds without them.

    What remains holds. Where it was always allowed to ask, and taking an item away never helps, it would not without
    any one of them. That takes at most two questions an item, few where most are needless, and one an item where none
    is. Where questions run out, those that come first in the list were not asked about.

    Args:
        items: which hold together.
        holds: whether a part of them does; it is told which items were left out.
        may_ask: whether another question is allowed.

    >>> without_needless([1, 2, 3, 4], lambda kept, left_out: {1, 3} <= set(kept))
    [1, 3]
    """
    needed: list[Item] = []
    rest, size = list(items), 1
    while rest and may_ask():
        size = min(size, len(rest))
        first, block = rest[:-size], rest[-size:]
        if holds([*first, *needed], block):
            rest, size = first, 2 * size
        elif size == 1:
            rest, needed = first, [*block, *needed]
        else:
            size //= 2
    return [*rest, *needed]
