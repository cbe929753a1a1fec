"""What every runtime offers: a session that runs a file, and an account of the kernels that it runs it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


class Session(Protocol):
    """A loaded file.

    Attributes:
        inputs: names of the inputs, in order.
        types: of their numbers, in the same order.
    """

    inputs: list[str]
    types: list[np.dtype]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for one array an input."""
        ...


@dataclass(frozen=True)
class Kernels:
    """What a file became on the runtime.

    Attributes:
        counts: operator types of the graph that is executed, with how often each occurs.
        integer: names of the file's nodes that run on integer kernels, what is computed inside such a kernel too.
        floating: names of the multiplying nodes that stayed in float.
        packed: names of the nodes that read weights of few bits and compute in float.
    """

    counts: dict[str, int]
    integer: tuple[str, ...]
    floating: tuple[str, ...]
    packed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Runtime:
    """A program that executes ONNX files.

    Attributes:
        name: its package's.
        open: loads a file, given a path and the number of threads (None for all cores).
        inspect: says what a file became, given the same.
        profile: microseconds that each of the file's nodes takes in a run, by name, given one array an input too; None
            for a runtime whose times mean nothing.
    """

    name: str
    open: Callable[[Path, int | None], Session]
    inspect: Callable[[Path, int | None], Kernels]
    profile: Callable[[Path, int | None, Sequence[np.ndarray]], dict[str, float]] | None = None
