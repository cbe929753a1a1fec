"""Models handed over in half precision or float64: computed in float32 here, and kept as they are to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from halfstep.errors import ArgumentError
from halfstep.graph.inputs import move

#: The type that graphs, ranges, training and files compute in.
COMPUTED = torch.float32

#: What torch's automatic mixed precision computes in; anything else it would leave undone, with a mere warning.
AUTOCAST = (None, torch.bfloat16, torch.float16)

Values = TypeVar("Values")


def other_types(model: nn.Module) -> tuple[torch.dtype, ...]:
    """The floating-point types that give way to float32 when ``model`` is captured; none for most models.

    Those of fewer bits wherever they occur; float64 only if it is a parameter's: beside parameters in float32 a buffer
    has it for the sake of what is computed from it, and stays.
    """
    parameters = {tensor.dtype for tensor in model.parameters()}
    buffers = {tensor.dtype for tensor in model.buffers()}
    fewer = {x for x in parameters | buffers if x.is_floating_point and x.itemsize < COMPUTED.itemsize}
    return tuple(sorted(fewer | parameters & {torch.float64}, key=str))


def check_observed_in(dtype: torch.dtype | None) -> None:
    """Raise unless ``dtype`` is one that calibration data may pass in.

    Raises:
        ArgumentError: for another one; float16 turns what is beyond 65504 into infinities, which no range counts.
    """
    if dtype not in (None, torch.bfloat16):
        raise ArgumentError(
            f"autocast: got {dtype!r}, needed torch.bfloat16, which has the range of float32, or None"
        )


def in_float32(values: Values, types: Collection[torch.dtype]) -> Values:
    """``values``, any structure of tensors, with those of one of ``types`` in float32."""
    if not types:
        return values
    converted: Values = pytree.tree_map_only(
        Tensor, lambda x: x.to(COMPUTED) if x.dtype in types else x, values
    )
    return converted


def model_in_float32(model: nn.Module, types: Collection[torch.dtype]) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers of one of ``types`` are in float32; shared ones stay shared."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.data = in_float32(parameter.data, types)
    converted: dict[int, Tensor] = {}
    for module in twin.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[name] = converted.setdefault(id(buffer), in_float32(buffer, types))
    return twin


class HandedOver(nn.Module):
    """A user's model as it was handed over: what the scores of its quantized version are compared with.

    Floating-point inputs are cast to what it takes, copies where they have that type already, since it may write into
    them; outputs come in the types that it gives them.

    Args:
        model: in evaluation mode.
        types: those that give way to float32, see :func:`other_types`.
        wanted: the type of each floating-point input, by its place among ``(args, kwargs)``.
    """

    def __init__(
        self, model: nn.Module, types: tuple[torch.dtype, ...], wanted: Mapping[pytree.KeyPath, torch.dtype]
    ) -> None:
        super().__init__()
        self.model, self.types, self._wanted = model, types, wanted

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((tensor.device for tensor in self.parameters()), torch.device("cpu"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's model returns."""

        def cast(path: pytree.KeyPath, value: Any) -> Any:
            known = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(self._wanted.get(path, value.dtype), copy=True) if known else value

        args, kwargs = move(pytree.tree_map_with_path(cast, (args, kwargs)), self.device)
        return self.model(*args, **kwargs)

    def modules_alone(self) -> dict[str, Callable[..., Any]]:
        """The modules of a dict that was handed over, by name, each to be called by itself; inputs are cast as here."""

        def alone(name: str, module: nn.Module) -> Callable[..., Any]:
            wanted = {path: dtype for key, dtype in self._wanted.items() for path in _paths_alone(name, key)}
            return HandedOver(module, self.types, wanted)

        return {name: alone(name, module) for name, module in self.model.named_children()}

    def own_types(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in the types of the user's.

        Raises:
            ArgumentError: naming the parameter, if a value is beyond what its type can hold.
        """
        dtypes = {name: tensor.dtype for name, tensor in self.model.state_dict().items()}
        found = {name: value.to(dtypes[name]) for name, value in state.items()}
        for name, value in state.items():
            if value.is_floating_point() and bool((found[name].double().isinf() & ~value.isinf()).any()):
                raise ArgumentError(
                    f"parameter {name!r}: values up to {float(value.abs().max()):g} are beyond {dtypes[name]}, in "
                    "which the user's module has it; use state_dict() instead, which is float32"
                )
        return found


def _paths_alone(name: str, path: pytree.KeyPath) -> Iterator[pytree.KeyPath]:
    """Where an input among the arguments of a dict of modules is among those of the module called ``name``."""
    _, module, *rest = path
    if getattr(module, "key", None) != name:
        return
    positional = not rest or isinstance(rest[0], pytree.SequenceKey)
    yield (pytree.SequenceKey(0 if positional else 1), *(rest or (pytree.SequenceKey(0),)))


def hand_over(
    model: nn.Module, types: tuple[torch.dtype, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> HandedOver:
    """``model`` with the types of inputs that it takes: those of the example, or else those of its parameters.

    Args:
        model: in evaluation mode.
        types: those that give way to float32, at least one of which it has.
        args: positional example inputs.
        kwargs: the others.

    Raises:
        Exception: the model's own, if it takes the example inputs in neither.
    """
    given = {
        path: value.dtype
        for path, value in pytree.tree_flatten_with_path((args, dict(kwargs)))[0]
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    own = next(tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in types)
    found = HandedOver(model, types, given)
    with torch.no_grad():
        try:
            found(*args, **kwargs)
        except Exception:
            other = HandedOver(model, types, dict.fromkeys(given, own))
            with suppress(Exception):
                other(*args, **kwargs)
                return other
            raise
    return found
