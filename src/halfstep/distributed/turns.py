"""Items that ranks take in turns, so that their results come in order and whoever reads them may stop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from halfstep.distributed.messages import raised, said_of
from halfstep.distributed.share import Share, share
from halfstep.errors import RankError

#: Items of each rank between two exchanges of :func:`in_turns`: few at first, since who reads may soon have enough.
ROUNDS = (1, 2, 4)


class Turns:
    """This rank's part of items that all take in turns."""

    def __init__(self, mine: Share, work: Callable[[int, Any], Any], items: Iterable[Any]) -> None:
        self.mine, self.work = mine, work
        self._items = iter(enumerate(items))
        self.seen, self.ended = 0, False
        self.raised: Exception | None = None  # here, and so not to be told of

    def take(self, rounds: int) -> tuple[dict[int, Any], tuple[int, Any] | None, int, bool]:
        """Results of this rank's next items by number; the first error with its number; items so far; the end."""
        found: dict[int, Any] = {}
        error: tuple[int, Any] | None = None
        for _ in range(rounds * self.mine.size):
            try:
                index, item = next(self._items)
            except StopIteration:
                self.ended = True
                break
            except Exception as raised_here:
                self.ended, error = True, error or (self.seen, said_of(raised_here))
                self.raised = self.raised or raised_here
                break
            self.seen += 1
            if self.mine.has(index) and error is None:
                try:
                    found[index] = self.work(index, item)
                except Exception as raised_here:
                    error, self.raised = (index, said_of(raised_here)), raised_here
        return found, error, self.seen, self.ended


def help_along(work: Callable[[int, Any], Any], items: Iterable[Any]) -> None:
    """:func:`in_turns`, for the other ranks."""
    mine = share()
    turns = Turns(mine, work, items)
    for rounds in exchanges():
        mine.gather(turns.take(rounds), "scores")
        if turns.ended or mine.told() != "on":
            return


def exchanges() -> Iterator[int]:
    """After how many items of each rank results are exchanged, time after time."""
    return itertools.chain(ROUNDS, itertools.repeat(ROUNDS[-1]))


def in_order(
    parts: list[tuple[dict[int, Any], tuple[int, Any] | None, int, bool]], own: Exception | None
) -> Iterator[Any]:
    """The results of all ranks in order, up to the first error, which is raised; rank 0's is ``own``.

    Raises:
        RankError: naming a rank that has other data than rank 0.
    """
    results: dict[int, Any] = {}
    errors = []
    seen = parts[0][2]
    for rank, (found, error, _, _) in enumerate(parts):
        results |= found
        if error is not None:
            errors.append((*error, rank))
    for rank, (_, _, count, _) in enumerate(parts):
        if count != seen and not errors:
            raise RankError(
                f"rank {rank}: got {count} batches of the data where rank 0 got {seen}; give every rank the same data, "
                "all of them: each takes its part by itself"
            )
    index, words, rank = min(errors, key=lambda error: error[0]) if errors else (None, None, 0)
    for place in sorted(results):
        if index is not None and place > index:
            break
        yield results[place]
    if words is not None:
        raise own if rank == 0 and own is not None else raised(words, rank)
