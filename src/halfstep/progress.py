"""Progress of long loops, told to whoever listens; nobody by default.

The command line listens and draws bars. Library code only wraps its loops in :func:`track`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")


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


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of every loop in the block."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def say(sentence: str) -> None:
    """Tell the listener what was found out."""
    listener = _LISTENER.get()
    if listener is not None:
        listener.say(sentence)


@contextmanager
def steps(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A loop called ``what``; call the value with the number of steps done."""
    listener = _LISTENER.get()
    if listener is None:
        yield lambda _: None
        return
    task = listener.start(what, total)
    try:
        yield lambda count: listener.advance(task, count)
    finally:
        listener.end(task)


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over ``items`` and tell of it; ``total`` defaults to their length where they have one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with steps(what, total) as advance:
        for item in items:
            yield item
            advance(1)
