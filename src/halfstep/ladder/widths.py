"""The fewest bytes within a bound on the loss: which items go to fewer bits, by questions whether a set of them holds.

Each item has levels, the widest first, with the bytes and the loss of each. A *move* takes one item to a lower level.
Moves are sorted by the loss that a byte saved costs; as many of them as hold are found by gallop and bisection, and
what is left over is tried step by step. Only the answers decide; losses give the order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halfstep.ladder.gallop import gallop, without_needless

#: For each item its levels, the widest first: (bytes, loss).
Table = Sequence[Sequence[tuple[int, float]]]

#: The level of each item, 0 for the widest.
Levels = tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """One item to a lower level.

    Attributes:
        item: which.
        start: the level where it comes from.
        level: where it goes to.
        saved: bytes, more than 0.
        loss: more than where it comes from; negative where the lower level loses less.
    """

    item: int
    start: int
    level: int
    saved: int
    loss: float

    @property
    def rate(self) -> float:
        """The loss for each byte saved."""
        return self.loss / self.saved


def moves_of(table: Table) -> list[Move]:
    """The moves down the lower convex hull of each item's levels, those with the least loss for a byte first.

    Levels that save nothing over a wider one, lose more than a mixture of their neighbours would, or lose without
    bound, are passed by. An item's moves come in their order, since on a hull each costs more than the one before.

    >>> moves_of([[(8, 0.0), (4, 1.0), (2, 1.5)], [(80, 0.0), (80, 0.0), (20, 3.0)]])
    [Move(item=1, start=0, level=2, saved=60, loss=3.0), Move(item=0, start=0, level=1, saved=4, loss=1.0), \
Move(item=0, start=1, level=2, saved=2, loss=0.5)]
    """
    found: list[Move] = []
    for item, levels in enumerate(table):
        at = 0
        while (move := min(_steps(item, levels, at), key=_cheapest, default=None)) is not None:
            found.append(move)
            at = move.level
    return sorted(found, key=lambda move: move.rate)


def _steps(item: int, levels: Sequence[tuple[int, float]], at: int) -> list[Move]:
    """Every move of an item from a level."""
    size, loss = levels[at]
    return [
        Move(item, at, level, size - levels[level][0], levels[level][1] - loss)
        for level in range(at + 1, len(levels))
        if levels[level][0] < size and math.isfinite(levels[level][1] - loss)
    ]


def _cheapest(move: Move) -> tuple[float, int]:
    """The least loss for a byte; of equal ones the shortest."""
    return move.rate, move.level


def after(levels: Levels, moves: Sequence[Move]) -> Levels:
    """The levels after these moves in order; one whose item does not stand where it begins is none."""
    at = list(levels)
    for move in moves:
        if at[move.item] == move.start:
            at[move.item] = move.level
    return tuple(at)


def most_moves(moves: Sequence[Move], holds: Callable[[int], bool]) -> int:
    """How many of the first moves can be made: a number that holds, while one more does not.

    None at all is taken to hold. Where losses add up and no move makes the loss less, no assignment that holds saves
    more bytes than these moves and the next one together: the first moves are the optimum of the problem in which
    parts of moves can be made. At most :data:`.QUESTIONS` of a gallop over all of them are asked, whatever the answers.

    Source: Dantzig, "Discrete-Variable Extremum Problems", Operations Research 5 (1957), for the bound.
    """
    fails = gallop(len(moves), lambda count: not holds(count))
    return len(moves) if fails is None else fails - 1


def steps_from(table: Table, levels: Levels) -> list[Move]:
    """Every step that is left to the next lower level that saves bytes, those with the least loss for a byte first.

    None comes before the one that it follows.
    """
    found: list[tuple[float, Move]] = []
    for item, at in enumerate(levels):
        rate = -math.inf
        while steps := _steps(item, table[item], at):
            step = min(steps, key=lambda move: move.level)
            rate = max(rate, step.rate)
            found.append((rate, step))
            at = step.level
    return [step for _, step in sorted(found, key=lambda pair: pair[0])]


def further(
    levels: Levels,
    steps: Sequence[Move],
    holds: Callable[[Levels, Sequence[Move]], bool],
    may_ask: Callable[[], bool] = lambda: True,
) -> Levels:
    """Try to make more steps, those first that come first: one, and twice as many each time that it holds with them.

    A step whose item does not stand where it begins waits for the one before it. What comes back holds if ``levels``
    do. At most two questions a step, see :func:`.without_needless`.

    Args:
        levels: that hold.
        steps: of :func:`steps_from`.
        holds: whether other levels do; it is told which steps are new.
        may_ask: whether another question is allowed.
    """
    best = levels

    def still_holds(left: list[int], tried: list[int]) -> bool:
        nonlocal best
        there = after(levels, [steps[place] for place in sorted(set(range(len(steps))) - set(left))])
        if there == best:  # all that was tried waits for something
            return True
        if holds(there, [steps[place] for place in reversed(tried)]):
            best = there
            return True
        return False

    without_needless(range(len(steps))[::-1], still_holds, may_ask)
    return best
