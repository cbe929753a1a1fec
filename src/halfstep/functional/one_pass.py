"""Divide, round, clip and multiply in one pass over memory: what torch's operators take four passes for.

Used where one thread computes a batch by itself, beside others that compute theirs: a pass then costs as much as the
rest of many a layer. Where torch shares its operators out to several threads, they are as fast together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfstep.formats import Integer

#: Fewer elements than this stay in the first cache, where passes cost little.
WORTHWHILE = 2**12


def serves(x: Tensor, scale: Tensor, format: Integer) -> bool:
    """Whether this arithmetic can be used, and one thread computes."""
    return serves_dense(x, scale, format) and torch.get_num_threads() == 1


def serves_dense(x: Tensor, scale: Tensor, format: Integer) -> bool:
    """Whether this arithmetic can be used: one scale, float32 in the host's memory, not being compiled.

    And numba compiles: with NUMBA_DISABLE_JIT the loops would take a thousand times as long.
    """
    return (
        scale.dim() == 0
        and x.dtype == scale.dtype == torch.float32
        and x.device.type == scale.device.type == "cpu"
        and x.numel() >= WORTHWHILE
        and (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)))
        and type(x) in (Tensor, torch.nn.Parameter)  # no stand-in for what is only traced
        and not (format.mid_rise or format.round_shifted)
        and not torch.compiler.is_compiling()
        and _compiles()
    )


def fake_quantize(x: Tensor, scale: Tensor, low: float, high: float, overwrite: bool = False) -> Tensor:
    """Round ``x`` to whole steps from ``low`` to ``high``, ties to even, times ``scale``; NaN stays, no -0.0 comes out.

    Args:
        x: float32, contiguous or channels last; the result is as well.
        scale: float32, one number.
        low: the least step, a whole number.
        high: the greatest one.
        overwrite: write into ``x`` and return it: no page of memory has to be asked for.
    """
    step = np.float32(scale.item())
    if overwrite:
        _loop_in_place()(flat(x), step, np.float32(low), np.float32(high))
        return x
    result = torch.empty_like(x)
    _loop()(flat(x), flat(result), step, np.float32(low), np.float32(high))
    return result


def flat(x: Tensor) -> Any:
    """The elements as they lie in memory."""
    return x.detach().as_strided((x.numel(),), (1,)).numpy()


def _compiles() -> bool:
    import numba

    return not numba.config.DISABLE_JIT  # type: ignore[attr-defined]


@cache
def _loop() -> Callable[..., None]:
    from halfstep.machine_code import compiled

    zero = np.float32(0)

    def one_pass(x: Any, result: Any, scale: Any, low: Any, high: Any) -> None:
        for i in range(x.size):
            steps = np.rint(x[i] / scale)
            steps = low if steps < low else steps
            steps = high if steps > high else steps
            result[i] = zero + scale * steps

    return compiled(one_pass, "one_pass")


@cache
def _loop_in_place() -> Callable[..., None]:
    """The same over one array: of two that may be one numba does not know that they are not shifted."""
    from halfstep.machine_code import compiled

    zero = np.float32(0)

    def in_place(x: Any, scale: Any, low: Any, high: Any) -> None:
        for i in range(x.size):
            steps = np.rint(x[i] / scale)
            steps = low if steps < low else steps
            steps = high if steps > high else steps
            x[i] = zero + scale * steps

    return compiled(in_place, "in_place")
