"""Why a model cannot be captured: which module and line stopped the tracing, and what to try."""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

_OURS_AND_TORCHS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


#: What torch's messages about operands of different types have in common.
_TYPES_DIFFER = re.compile(r"dtype|type \(|Half|BFloat16|Double")


def where(model: nn.Module, error: Exception) -> str:
    """The user's module and line at which ``error`` was raised, where that is known, and its first line."""
    found = _places(model, traceback.walk_tb(error.__traceback__))
    kind = type(error).__name__
    text = str(error).strip().splitlines()
    return f"{found[-1] + ': ' if found else ''}{text[0] if text else kind} ({kind})"


def fixed_at(trace: Callable[[], Any], model: nn.Module, size: int) -> str:
    """The user's module and line that made a dimension of this ``size`` the number that it is in the example.

    Torch tells it only while it traces, so the model is traced once more.

    Returns:
        The place, or nothing where torch decided it by itself.
    """
    places: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if re.match(rf"set_replacement s\d+ = {size}\b", record.getMessage()):
                places.extend(_places(model, traceback.walk_stack(None))[:1])

    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = log.handlers, log.level, log.propagate
    log.handlers, log.propagate = [Listener()], False
    log.setLevel(logging.INFO)
    try:
        trace()
    except Exception:  # the same as before: only the place is wanted
        return places[0] if places else ""
    finally:
        log.handlers, level, log.propagate = before
        log.setLevel(level)
    return ""


def _places(model: nn.Module, frames: Iterable[tuple[FrameType, int]]) -> list[str]:
    """Those frames that run a method of a module of the user's, in words."""
    paths = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    found = []
    for frame, line in frames:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
        file = code.co_filename
        if id(owner) in paths and isinstance(owner, nn.Module) and not file.startswith(_OURS_AND_TORCHS):
            found.append(f"module {paths[id(owner)]!r}, {file}:{line}")
    return found


def explain(
    model: nn.Module, error: Exception, inputs: Sequence[Any], converted: Sequence[torch.dtype] = ()
) -> str:
    """Which module and line stopped the tracing, in one sentence, and what to try.

    Args:
        model: that was traced.
        error: that ended it.
        inputs: that it was traced with.
        converted: the types that were converted to float32 before.
    """
    kind = type(error).__name__
    odd = [x.dtype for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    odd = [dtype for dtype in odd if dtype is not torch.float32]
    if converted and _TYPES_DIFFER.search(str(error)):
        advice = (
            f"its {words(converted)} was converted to torch.float32 before: code that names a type, such as "
            "x.to(torch.float16), must take that of what it computes with: x.to(self.weight.dtype)"
        )
    elif odd and "dtype" in str(error):
        advice = f"example_inputs hold a {odd[0]}, the model's parameters are torch.float32: convert it with x.float()"
    elif "DataDependent" in kind or "data-dependent" in str(error):
        advice = (
            "the path taken depends on the values of a tensor, which a fixed graph cannot express: replace the "
            "`if`/`while` by torch.where or masking, or capture the submodule without it"
        )
    elif "Constraint" in kind or "Dim.DYNAMIC" in str(error):
        advice = (
            "the code holds for some sizes only of a dimension that varies: give it padded inputs, leave the dimension "
            "out of dynamic, or make the code hold for all sizes"
        )
    else:
        advice = (
            "try torch.export.export(model.eval(), example_inputs) alone to see torch's own account; rewriting the "
            "line with plain tensor operations usually helps"
        )
    return f"the model cannot be captured: {where(model, error)}; {advice}"


def words(types: Sequence[torch.dtype]) -> str:
    """Types in words.

    >>> words([torch.bfloat16, torch.float16])
    'torch.bfloat16 and torch.float16'
    """
    return " and ".join(map(str, types))
