"""What torch's tracer and exporter leave beside their work: warnings of their own, and half a million objects."""

from __future__ import annotations

import gc
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

#: Imports of so many modules are those of torch's tracer, or of its exporter.
MANY_MODULES = 50


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's own deprecations and graph dumps off the user's terminal; errors are explained instead.

    Python's search for reference cycles rests too: torch makes objects by the hundred thousand here, and each search
    goes through all that are new. Where these are its tracer's and exporter's modules, which live on, what is there at
    the end is old, or is not searched at all within :func:`undisturbed`; else it is searched afterwards, or the
    networks of call after call would pile up.
    """
    disabled, searching, modules = logging.root.manager.disable, gc.isenabled(), len(sys.modules)
    logging.disable(logging.ERROR)
    gc.disable()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if searching:
            if len(sys.modules) - modules > MANY_MODULES:
                _set_aside.add()
            gc.enable()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave torch's tracer and exporter, once imported in the block, out of all searches until it ends.

    A search of everything goes through them for a third of a second, and comes at any moment once they are new: Python
    searches all where what is new is more than a quarter of what a search of all has seen before. Cycles that the block
    itself makes are searched as ever.
    """
    _set_aside.hold(1)
    try:
        yield
    finally:
        _set_aside.hold(-1)


class _SetAside:
    """What Python's search for cycles is told to leave out, for all blocks of a process."""

    def __init__(self) -> None:
        self._blocks, self._ours, self._turn = 0, False, threading.Lock()

    def add(self) -> None:
        """All objects that are there; without a block they are old instead."""
        with self._turn:
            if gc.get_freeze_count() and not self._ours:  # somebody's, who would lose it
                return
            gc.freeze()
            self._ours = True
            self._release()

    def hold(self, blocks: int) -> None:
        """So many blocks more have begun."""
        with self._turn:
            self._blocks += blocks
            self._release()

    def _release(self) -> None:
        if self._ours and not self._blocks:
            gc.unfreeze()  # to the oldest generation
            self._ours = False


_set_aside = _SetAside()
