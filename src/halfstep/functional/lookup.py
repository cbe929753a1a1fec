"""Find codebook cells by the upper half of a float's bits: exact, and ten times faster than a binary search.

The 65,536 patterns of a float32's upper 16 bits cut the real line into short intervals. A table tells for
each how many thresholds lie below its lowest number, so that only the few thresholds inside the interval
(mostly none) are left to compare with. Used on the CPU, outside compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Building the table costs about as much as searching this many elements.
WORTHWHILE = 2**15

#: Fewer elements than this are not worth a thread of their own.
PIECE = 2**19


def serves(x: Tensor, thresholds: Tensor) -> bool:
    """Whether the lookup can be used: one table, float32 in the host's memory, many elements, not being compiled.

    And numba compiles: with NUMBA_DISABLE_JIT the loops would take a thousand times as long.
    """
    return (
        thresholds.dim() == 1
        and len(thresholds) < 2**16
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= WORTHWHILE
        and not torch.compiler.is_compiling()
        and _compiles()
    )


def _compiles() -> bool:
    import numba

    return not numba.config.DISABLE_JIT  # type: ignore[attr-defined]


def replace(x: Tensor, values: Tensor, thresholds: Tensor, ties_up: bool) -> None:
    """Overwrite each element with the value of its cell; NaN stays NaN.

    Args:
        x: float32, dense in memory in any order of axes (as fresh tensors are), overwritten.
        values: (n,) float32.
        thresholds: (n - 1,) float32.
        ties_up: whether an element equal to a threshold gets the upper value.
    """
    flat, (bounds, starts) = _flat(x), _cells(thresholds)
    fill = _compiled().replace_ties_up if ties_up else _compiled().replace
    table = values.detach().numpy()  # learned values: other threads do not know that no gradient is wanted

    def work(piece: NDArray[np.float32]) -> None:
        fill(piece, piece.view(np.uint32), table, bounds, starts)

    # Plain threads rather than numba's parallel loops, whose waiting threads spin: beside torch's own they
    # took ten times as long on a busy machine.
    pieces = np.array_split(flat, max(1, min(torch.get_num_threads(), flat.size // PIECE)))
    work(pieces[0]) if len(pieces) == 1 else _together(work, pieces)


def totals(x: Tensor, amounts: Tensor, thresholds: Tensor) -> Tensor:
    """Return the sum of ``amounts`` over the elements of each cell, in float64; ties go down, NaN is in none.

    Args:
        x: float32, dense in memory.
        amounts: float32, of ``x``'s shape.
        thresholds: (n - 1,) float32.

    Returns:
        (n,) float32.
    """
    bounds, starts = _cells(thresholds)
    flat, weights = x.reshape(-1).numpy(), amounts.reshape(-1).numpy()
    return torch.from_numpy(_compiled().totals(flat, flat.view(np.uint32), weights, bounds, starts)).float()


def _flat(x: Tensor) -> NDArray[np.float32]:
    """Return all elements in the order of memory, as a view."""
    view: NDArray[np.float32] = x.as_strided((x.numel(),), (1,), x.storage_offset()).numpy()
    return view


def _cells(thresholds: Tensor) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
    """Return what the loops compare with, and the table of where to start."""
    bounds = thresholds.detach().numpy()
    return np.append(bounds, np.float32(np.nan)), _starts(bounds.tobytes())  # no search goes beyond NaN


def _together(work: Callable[[NDArray[np.float32]], None], pieces: list[NDArray[np.float32]]) -> None:
    """Work on every piece at once, one thread each."""
    with ThreadPoolExecutor(len(pieces) - 1) as pool:
        others = [pool.submit(work, piece) for piece in pieces[1:]]
        work(pieces[0])
        for other in others:
            other.result()


@lru_cache(maxsize=64)
def _starts(thresholds: bytes) -> NDArray[np.uint16]:
    """Return for each pattern of upper bits how many thresholds lie below the lowest number that has it."""
    patterns = np.arange(2**16, dtype=np.uint32) << 16
    lowest = np.where(patterns >> 31, patterns | 0xFFFF, patterns).astype(np.uint32).view(np.float32)
    starts = np.searchsorted(np.frombuffer(thresholds, dtype=np.float32), lowest, side="left")
    return np.where(np.isnan(lowest), 0, starts).astype(np.uint16)  # -inf shares its pattern with NaN


class _Loops(NamedTuple):
    replace: Callable[..., None]
    replace_ties_up: Callable[..., None]
    totals: Callable[..., NDArray[np.float64]]


@cache
def _compiled() -> _Loops:
    """Compile the loops, or load them; numba is imported here, where it is first needed."""
    from numba import njit

    from halfstep.machine_code import compiled

    # Not by moving the thresholds down by a bit: below zero that is a subnormal number, which a processor may take for
    # zero itself.
    @njit(nogil=True)
    def above(number: Any, bound: Any) -> Any:
        return number > bound

    @njit(nogil=True)
    def at_or_above(number: Any, bound: Any) -> Any:
        return number >= bound

    def replacing(passes: Callable[[Any, Any], Any], name: str) -> Callable[..., None]:
        def replace(x: Any, bits: Any, values: Any, bounds: Any, starts: Any) -> None:
            for i in range(x.size):
                number = x[i]
                code = starts[bits[i] >> 16]
                while passes(number, bounds[code]):
                    code += 1
                x[i] = values[code] if number == number else number  # NaN stays NaN

        return compiled(replace, name)

    def totals(x: Any, bits: Any, amounts: Any, bounds: Any, starts: Any) -> Any:
        sums = np.zeros((4, bounds.size))  # four, so that an addition need not wait for the one before
        for i in range(x.size):
            number = x[i]
            code = starts[bits[i] >> 16]
            while number > bounds[code]:
                code += 1
            sums[i & 3, code] += amounts[i] if number == number else 0.0
        return sums.sum(0)

    return _Loops(
        replacing(above, "replace"),
        replacing(at_or_above, "replace_ties_up"),
        compiled(totals, "totals"),
    )
