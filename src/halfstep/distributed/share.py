"""A rank's share of common work, as the work itself sees it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from halfstep.errors import RankError

if TYPE_CHECKING:
    from halfstep.distributed.crew import Crew
    from halfstep.distributed.ranks import Ranks

Result = TypeVar("Result")


class Share:
    """Which part of common work is this process's, and what it needs of the others.

    A process by itself has all of it, and what it gathers is its own.

    Args:
        ranks: all of them; None for a process by itself.
        crew: theirs.
        number: of the call that they all make.

    Attributes:
        rank: of this process, from 0.
        size: how many share.
    """

    def __init__(self, ranks: Ranks | None = None, crew: Crew | None = None, number: int = 0) -> None:
        self.rank, self.size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self._ranks, self._crew, self._number = ranks, crew, number

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which decides and writes."""
        return self.rank == 0

    def owner(self, index: int) -> int:
        """The rank whose the item of that number is.

        They take items there and back, 0 1 1 0 0 1 ..., so that items that cost ever less are shared evenly.
        """
        turn, place = divmod(index, self.size)
        return self.size - 1 - place if turn % 2 else place

    def has(self, index: int) -> bool:
        """Whether the item of that number is this rank's."""
        return self.owner(index) == self.rank

    def has_in_turn(self, index: int) -> bool:
        """Whether an item is this rank's where all cost alike: 0 1 0 1 ..., so that two ranks have a half each.

        What is kept by halves of the data, as histograms are, is then sent by one rank alone.
        """
        return index % self.size == self.rank

    def gather(self, value: Any, what: str) -> list[Any]:
        """On rank 0 the values of all ranks, in their order; elsewhere the own one, the others being None.

        Args:
            value: this rank's.
            what: that is, in a word.

        Raises:
            HalfstepError: on rank 0, another rank's.
        """
        found: list[Any] = [None] * self.size
        found[self.rank] = value
        if self._crew is None:
            return found
        if not self.leads:
            self._crew.answer(self._number, "part", value, what)
            return found
        for rank in range(1, self.size):
            found[rank] = self._crew.part(rank, self._number, what)
        return found

    def tell(self, value: Any) -> None:
        """Let the other ranks know ``value``; for rank 0."""
        if self._crew is not None:
            self._crew.tell(value, self._number)

    def told(self, value: Any = None) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self._crew is None:
            return value
        if self.leads:
            self.tell(value)
            return value
        return self._crew.serve()

    def ask(self, own: Callable[[], Result]) -> Result:
        """What rank 0 gets from ``own``, which may call the others; on every rank."""
        if self._crew is None:
            return own()
        if self.leads:
            return self._crew.ask(own, self._number)
        result: Result = self._crew.serve()
        return result

    def meet(self) -> None:
        """Wait until every rank is here.

        Raises:
            HalfstepError: on rank 0, that of a rank that has failed; the call ends on all others.
        """
        self.gather(None, "meeting")
        self.told()

    def same(self, what: str, value: Any, cure: str) -> None:
        """Raise unless every rank has the same value.

        Raises:
            RankError: naming the first rank whose is another.
        """
        values = self.gather(value, "comparison")
        if self.leads:
            for rank, other in enumerate(values):
                if other != value:
                    raise RankError(f"rank {rank}: {what} {other}, on rank 0 {value}; {cure}")
        self.told()

    def reduced(self, value: Any, merge: Callable[[Any, Any], Any], what: str) -> Any:
        """On rank 0 the values of all ranks merged, pair by pair along a tree; elsewhere some of them.

        Every rank sends once, and receives at most log2(size) times.

        Args:
            value: this rank's.
            merge: takes two values; any order must do.
            what: that is, in a word.
        """
        if self._ranks is None:
            return value
        self.meet()  # nobody waits for a rank that has failed
        step = 1
        while step < self.size:
            if self.rank % (2 * step):
                self._ranks.send(self.rank - step, pickle.dumps(value), what)
                break
            if self.rank + step < self.size:
                value = merge(value, pickle.loads(self._ranks.receive(self.rank + step, what)))
            step *= 2
        return value

    def add_up(self, tensor: Tensor, what: str) -> None:
        """Make ``tensor`` the sum over all ranks, in place."""
        if self._ranks is not None:
            self._ranks.add_up(tensor, what)

    def spoil(self) -> None:
        """Say that this call changes the models of all ranks: rank 0 sends their state anew afterwards."""
        if self._crew is not None and self.leads:
            self._crew.forget_state()


#: A process by itself.
ALONE = Share()

SHARE: ContextVar[Share] = ContextVar("share", default=ALONE)


def share() -> Share:
    """This rank's share of the work that is being done; all of it where no others are called to help."""
    return SHARE.get()
