"""Progress of long loops, told to whoever listens, and how much work they may cost.

The command line and :func:`halfstep.quantize` listen and draw bars (:mod:`halfstep.live`). Library code only wraps its
loops in :func:`track`. The same loops ask before every step whether to go on, so that a bound on time can end any of
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from halfstep.errors import ArgumentError

Item = TypeVar("Item")


class Interrupted(Exception):
    """What ends a loop within :func:`interruptible`."""


class Listener(Protocol):
    """Hears of loops as they start, advance and end."""

    def start(self, what: str, total: int | None) -> Any:
        """A loop of ``total`` steps (None: unknown) starts; the result is handed to the other two."""

    def advance(self, task: Any, steps: int) -> None:
        """``steps`` more are done."""

    def end(self, task: Any) -> None:
        """The loop is over, finished or not."""

    def say(self, sentence: str) -> None:
        """Something was found out."""


_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


_ASKED: ContextVar[tuple[Callable[[], None], ...]] = ContextVar("asked", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of every loop in the block."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def heard() -> bool:
    """Whether somebody listens."""
    return _LISTENER.get() is not None


def say(sentence: str) -> None:
    """Tell the listener what was found out."""
    listener = _LISTENER.get()
    if listener is not None:
        listener.say(sentence)


@contextmanager
def interruptible(ask: Callable[[], None]) -> Iterator[None]:
    """Ask ``ask`` before every step of every loop in the block; it ends them by raising an :class:`Interrupted`.

    Blocks within others ask all of them, the outermost first. Whoever loops leaves the model as it found it when such
    an error passes.
    """
    token = _ASKED.set((*_ASKED.get(), ask))
    try:
        yield
    finally:
        _ASKED.reset(token)


@contextmanager
def protected() -> Iterator[None]:
    """Let the block run to its end, whatever :func:`interruptible` blocks there are around it."""
    token = _ASKED.set(())
    try:
        yield
    finally:
        _ASKED.reset(token)


def may_go_on() -> None:
    """Raise if the work is to end here; for loops that are too quick to be told of."""
    for ask in _ASKED.get():
        ask()


@contextmanager
def steps(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A loop called ``what``; call the value with the number of steps done."""
    may_go_on()
    listener, done = _LISTENER.get(), 0
    task = None if listener is None else listener.start(what, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if listener is not None:
            listener.advance(task, count)
        if total is None or done < total:  # nothing is spared by stopping behind the last step
            may_go_on()

    try:
        yield advance
    finally:
        if listener is not None:
            listener.end(task)


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over ``items`` and tell of it; ``total`` defaults to their length where they have one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with steps(what, total) as advance:
        for item in items:
            yield item
            advance(1)


class BudgetSpent(Interrupted):
    """Stops a rung where it is; the climb goes on with the best candidate so far."""


@dataclass(frozen=True)
class Budget:
    """A bound on evaluations, on time, or on both; what is reached first ends the search.

    The float baseline and the deployed file are always evaluated, and count.

    Attributes:
        evaluations: full evaluations of the metric, parts counted as parts; None for any number.
        minutes: since the start of the call; None for any time.

    >>> Budget(evaluations=3).spent(evaluations=3, seconds=1.0)
    '3 of 3 evaluations'
    """

    evaluations: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("evaluations", "minutes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ArgumentError(
                    f"budget: {name} is {value}, needed a number above 0, or None for no bound"
                )

    def spent(self, evaluations: float, seconds: float) -> str:
        """What is used up, in words; empty while there is something left."""
        if self.evaluations is not None and evaluations >= self.evaluations:
            return f"{evaluations:.3g} of {self.evaluations} evaluations"
        if self.minutes is not None and seconds >= self.minutes * 60:
            return f"{seconds / 60:.1f} of {self.minutes:g} minutes"
        return ""

    def __str__(self) -> str:
        bounds = [f"{value:g} {name}" for name, value in vars(self).items() if value is not None]
        return " or ".join(bounds) or "no bound"
