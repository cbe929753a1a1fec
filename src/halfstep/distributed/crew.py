"""Work shared among the ranks of a run: rank 0 decides, the others help where it calls them.

Rank 0 runs the ladder as a single process would. Where there is work that divides, it calls :func:`together` or
:func:`in_turns`; the other ranks wait in :meth:`Crew.serve`, make the same call on objects of their own, and each does
its share. So no decision is taken twice, and clocks, journals and races of files are rank 0's alone.

What is called must be known by its name. Models, and what says so by an attribute ``known_by_name``, such as metrics
with their data, are not sent: every rank has its own under the same name (:meth:`Crew.share`), and what changed of a
model's state goes ahead of a call.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from halfstep.distributed.messages import StatePart, Unknown, packed, raised, said_of, unpacked
from halfstep.distributed.ranks import Ranks, group_is_there
from halfstep.distributed.share import ALONE, SHARE, Share
from halfstep.distributed.turns import Turns, exchanges, help_along, in_order
from halfstep.errors import HalfstepError, RankError
from halfstep.progress import interruptible, say

Item = TypeVar("Item")
Result = TypeVar("Result")


class Replica(Protocol):
    """Carries the state of an object from rank 0 to the others."""

    def parts(self) -> Mapping[str, StatePart]:
        """The state, by name."""
        ...

    def take(self, parts: Mapping[str, StatePart]) -> None:
        """Take over those parts that changed."""
        ...


_CREW: ContextVar[Crew | None] = ContextVar("crew", default=None)


def together(function: Callable[..., Result], *args: Any) -> Result:
    """``function(*args)`` on every rank, each doing its :func:`share`; what it returns on rank 0.

    Without a crew, within another such call, or where an argument is not known to all ranks, a plain call.
    """
    found = _CREW.get()
    if found is None or SHARE.get() is not ALONE or (message := found.message(function, args)) is None:
        return function(*args)
    return found.call(message, lambda: function(*args))


def in_turns(work: Callable[[int, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``work(index, item)`` of every item in order, the ranks taking turns; they stop when nobody reads on.

    Args:
        work: known by its name, on objects known to all ranks; else rank 0 does it all.
        items: the same on every rank.

    Raises:
        RankError: naming a rank that has another number of items.
    """
    found = _CREW.get()
    if (
        found is None
        or SHARE.get() is not ALONE
        or (message := found.message(help_along, (work, items))) is None
    ):
        return itertools.starmap(work, enumerate(items))
    return found.lead(message, work, items)


def keep(made: Any, *args: Any, by: Callable[..., Any] | None = None) -> None:
    """Let every rank of a run make what is being made here, of the same arguments, for calls to come.

    Args:
        made: by its class, of ``args``; weakly referred to: it is forgotten everywhere when it is gone here.
        args: of its class; where they are not known to all ranks, it stays with this one.
        by: what makes it of ``args`` elsewhere, instead of its class.
    """
    found = _CREW.get()
    if found is not None and SHARE.get() is ALONE:
        found.keep(made, args, by or type(made))


class Crew:
    """The ranks of a run, or one process by itself.

    Args:
        ranks: the others and this one; None for a single process.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        self.leads = ranks is None or ranks.rank == 0
        self.everyone = ALONE if ranks is None else Share(ranks, self)  # outside of calls
        self._shared: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        self._replicas: dict[str, Replica] = {}
        self._sent: dict[tuple[str, str], bytes] = {}
        self._serial = itertools.count(1)
        self._running: list[int] = []  # calls, the innermost last
        self._dropped: list[str] = []
        self._unsent: set[str] = set()  # what cannot be sent, and was told of
        self._mail: dict[tuple[int, int], list[tuple[str, Any]]] = {}  # by rank and call

    # what all ranks have

    def share(self, name: str, shared: Any, replica: Replica | None = None) -> None:
        """Let ``shared`` be known to all ranks by a name; every rank does so with its own.

        Args:
            name: of it.
            shared: a model, metric, or data; an earlier one of that name is forgotten.
            replica: carries its state to the other ranks.
        """
        if shared is None:
            return
        self._shared[name] = shared
        self._names.setdefault(id(shared), name)
        if replica is not None:
            self._replicas[name] = replica

    def keep(self, made: Any, args: tuple[Any, ...], maker: Callable[..., Any]) -> None:
        """:func:`keep`, where there is a crew."""
        name = f"kept {next(self._serial)}"
        message = self.message(_make, (name, maker, args))
        if message is None:
            return
        self.call(message, lambda: None)
        self._shared[name] = weakref.ref(made)
        self._names[id(made)] = name
        weakref.finalize(made, self._forget, name, id(made))

    def _forget(self, name: str, identity: int) -> None:
        del self._shared[name], self._names[identity]
        self._dropped.append(name)

    # rank 0

    def message(self, function: Callable[..., Any], args: tuple[Any, ...]) -> bytes | None:
        """A call as the other ranks take it; None where there are none, or an argument is not known to them.

        Warns, once, of what cannot be sent; what only rank 0 has is told of by :func:`.say`.
        """
        if self.ranks is None or not self.leads:
            return None
        try:
            return packed(("call", function, args), self._names)
        except Unknown as unknown:
            say(f"Rank 0 works alone on what needs a {unknown}, which the other ranks have not")
        except (pickle.PicklingError, AttributeError, TypeError) as error:  # a closure, an open file ...
            if (what := _named(function, args)) not in self._unsent:
                self._unsent.add(what)
                warnings.warn(
                    f"{what}: rank 0 works alone on it, since it cannot be sent to the other ranks ({error}); give "
                    "functions and classes that a module defines by name, and no open files or locks",
                    stacklevel=4,
                )
        return None

    def call(self, message: bytes, own: Callable[[], Result]) -> Result:
        """Have every rank make a call, and make it here."""
        number = self._announce(message)
        token = SHARE.set(Share(self.ranks, self, number))
        try:
            result = own()
        except Exception:
            self._abort(number)
            raise
        finally:
            SHARE.reset(token)
        self._collect(number)
        return result

    def lead(
        self, message: bytes, work: Callable[[int, Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """:func:`in_turns`, for rank 0."""
        number = self._announce(message)
        mine = Share(self.ranks, self, number)
        try:
            turns = Turns(mine, work, items)
            for rounds in exchanges():
                parts = mine.gather(turns.take(rounds), "scores")
                yield from in_order(parts, turns.raised)
                if turns.ended:
                    break
                mine.tell("on")
        except (Exception, GeneratorExit):
            self._abort(number)
            raise
        self._collect(number)

    def ask(self, own: Callable[[], Result], number: int) -> Result:
        """What ``own`` returns, told to all ranks; meanwhile they help with what it calls them for."""
        token = SHARE.set(ALONE)
        try:
            result = own()
        finally:
            SHARE.reset(token)
        self.tell(result, number)
        return result

    def tell(self, value: Any, number: int = 0) -> None:
        """Let all ranks know ``value``, which they wait for."""
        assert self.ranks is not None
        self.ranks.tell(packed(("value", value, number), self._names), "decisions")

    def end(self, value: Result) -> Result:
        """The last thing that the others are told, their models being what rank 0's is: ``value``."""
        if self.ranks is not None:
            self._send_state()
            self.tell(value)
        return value

    def forget_state(self) -> None:
        """Other ranks' models may have become others: with the next call all of their state is sent."""
        self._sent.clear()

    def _announce(self, message: bytes) -> int:
        assert self.ranks is not None
        number = next(self._serial)
        self._send_state()
        dropped, self._dropped = self._dropped, []
        self.ranks.tell(packed(("next", number, dropped), self._names), "calls")
        self.ranks.tell(message, "calls")
        return number

    def _send_state(self) -> None:
        assert self.ranks is not None
        for name, replica in self._replicas.items():
            if changed := self._changed(name, replica):
                self.ranks.tell(packed(("state", name, changed), self._names), "model")

    def _changed(self, name: str, replica: Replica) -> dict[str, StatePart]:
        changed = {}
        for place, part in replica.parts().items():
            if self._sent.get((name, place)) != (digest := part.digest()):
                self._sent[name, place], changed[place] = digest, part
        return changed

    def part(self, rank: int, number: int, what: str) -> Any:
        """What a rank has to give in a call.

        Raises:
            HalfstepError: its own, where it failed.
        """
        kind, said = self._receive(rank, number, what)
        if kind == "part":
            return said
        self._mail[rank, number].append((kind, said))  # it is awaited once more
        raise raised(said, rank) if kind == "error" else RankError(f"rank {rank}: is done without {what}")

    def _receive(self, rank: int, number: int, what: str) -> tuple[str, Any]:
        """What a rank says next in a call."""
        assert self.ranks is not None
        box = self._mail.setdefault((rank, number), [])
        while not box:
            said = unpacked(self.ranks.receive(rank, what), self._shared)
            self._mail.setdefault((rank, said[0]), []).append((said[1], said[2]))
        return box.pop(0)

    def _collect(self, number: int) -> None:
        """Wait until every rank is done with a call; raise the first error."""
        assert self.ranks is not None
        errors = []
        for rank in range(1, self.ranks.size):
            kind = ""
            while kind not in ("done", "error"):
                kind, said = self._receive(rank, number, "the end of what all do")
            if kind == "error":
                errors.append(raised(said, rank))
            self._mail.pop((rank, number), None)
        if errors:
            self.forget_state()
            raise errors[0]

    def _abort(self, number: int) -> None:
        """End a call that has failed here; other ranks' errors are of no interest then."""
        assert self.ranks is not None
        self.forget_state()
        if self.ranks.watch.fault:
            return
        with contextlib.suppress(HalfstepError):  # the first one counts
            self.ranks.tell(packed(("abort", number, None), self._names), "decisions")
            self._collect(number)

    # the other ranks

    def serve(self) -> Any:
        """Help rank 0 until it tells a value; that value.

        Raises:
            RankError: rank 0 was lost.
            HalfstepError: what ended rank 0.
        """
        assert self.ranks is not None
        number = 0
        while True:
            kind, *said = unpacked(self.ranks.hear(), self._shared)
            if kind == "value":
                return said[0]
            if kind == "state":
                self._replicas[said[0]].take(said[1])
            elif kind == "next":
                number = said[0]
                self.ranks.settle()  # rank 0 has heard all of the calls before
                for name in said[1]:
                    del self._names[id(self._shared.pop(name))]
            elif kind == "call":
                self._help(number, *said)
            elif kind == "failed":
                raise raised(said[0], 0)
            elif said[0] in self._running:  # an abort of what is not over here
                raise _Aborted(said[0])

    def _help(self, number: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        assert self.ranks is not None
        self._running.append(number)
        token = SHARE.set(Share(self.ranks, self, number))
        report: tuple[str, Any] = "done", None
        try:
            made = function(*args)
            if function is _make:
                self.share(*made)
        except _Aborted as aborted:
            if aborted.number != number:
                raise
        except RankError:
            raise
        except Exception as error:
            report = "error", said_of(error)
        finally:
            SHARE.reset(token)
            self._running.remove(number)
        self.answer(number, *report, "decisions")

    def answer(self, number: int, kind: str, value: Any, what: str) -> None:
        """Say something to rank 0 in a call."""
        assert self.ranks is not None
        self.ranks.send(0, packed((number, kind, value), self._names), what)


class _Aborted(BaseException):
    """Rank 0 has ended a call."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def crew() -> Iterator[Crew]:
    """The crew of a run for the length of a block: all ranks of ``torch.distributed``, or this process alone.

    An error ends the run on every rank: those that did not make it raise it too, with the number of the one that did.

    Raises:
        RankError: a rank was lost, or does not come.
    """
    if not group_is_there():
        yield Crew()
        return
    ranks = Ranks()
    made = Crew(ranks)
    token = _CREW.set(made)
    try:
        with interruptible(ranks.watch.check), warnings.catch_warnings():
            if not made.leads:
                warnings.simplefilter("ignore")  # rank 0 gives them
            yield made
    except BaseException as error:
        words = said_of(error)
        if made.leads and isinstance(error, Exception) and not ranks.watch.fault:
            with contextlib.suppress(HalfstepError):  # they may be gone as well
                ranks.tell(packed(("failed", words), {}), "decisions")
        ranks.close(f"{words[0]}: {words[1]}")
        raise
    else:
        ranks.close()
    finally:
        _CREW.reset(token)


def current() -> Crew | None:
    """The crew of the run that is going on."""
    return _CREW.get()


def _named(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """What a call is of, in code: the work of :func:`in_turns`, or the function itself."""
    work: Any = args[0] if function is help_along else function
    work = getattr(work, "func", work)  # of a partial
    return f"{work.__module__}.{work.__qualname__}" if hasattr(work, "__qualname__") else repr(work)


def _make(name: str, maker: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, Any]:
    return name, maker(*args)
