"""hs.from_onnx: an ONNX file as a module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from halfstep.errors import DataError
from halfstep.graph.inputs import ModelInputs, call_arguments
from halfstep.onnx_in.origin import Origin
from halfstep.onnx_in.table import DTYPES

if TYPE_CHECKING:
    from halfstep.onnx_in.network import OnnxNetwork
    from halfstep.onnx_in.reader import Tensor

#: Sizes of a batch that is made up.
EXAMPLES = 2


def from_onnx(path: str | Path, inputs: ModelInputs | None = None) -> nn.Module:
    """The network of an ONNX file as a module, which can be observed, quantized, repaired and trained like any other.

    Its parameters are called as the file's tensors are, its layers as the file's nodes. It takes the file's inputs in
    their order or by their names (those that Python can have; others with underscores), and returns the file's only
    output, or a dict of several. Its first dimension should be dynamic: a batch of at least 2 is what networks are
    captured with.

    Each node is run by itself on what ONNX Runtime has for its inputs, and its outputs are compared.

    Args:
        path: of the file; tensors beside it are read from its folder.
        inputs: a tensor, tuple or dict to compare on; None makes up two examples from the declared types: normal
            floats, and integers of 0 and 1.

    Raises:
        CaptureError: if the file cannot be read, has an operator that is not known, or a node answers otherwise than
            ONNX Runtime; the message names it.
        DataError: if the inputs do not fit the file's.

    >>> hs.prepare(hs.from_onnx("model.onnx"), torch.randn(2, 3, 224, 224))  # doctest: +SKIP
    """
    from halfstep.onnx_in.gate import check_nodes
    from halfstep.onnx_in.network import make_network
    from halfstep.onnx_in.reader import read

    network = make_network(read(path))
    check_nodes(network, made_up(network) if inputs is None else by_name(network, inputs))
    return network


def opened(model: nn.Module | str | Path, inputs: ModelInputs | None) -> tuple[nn.Module, ModelInputs]:
    """A module and example inputs, where a file may be given for the one and nothing for the other.

    Raises:
        DataError: if nothing is given for the inputs of a module.
    """
    if isinstance(model, nn.Module):
        if inputs is None:
            raise DataError(
                "example_inputs: got None, needed a tensor, tuple or dict with a batch of at least 2"
            )
        return model, inputs
    network: Any = from_onnx(model, inputs)
    return network, tuple(made_up(network).values()) if inputs is None else inputs


def origin_of(model: nn.Module) -> Origin | None:
    """The file that a module was read from; None for any other module."""
    found = getattr(model, "origin", None)
    return found if isinstance(found, Origin) else None


def by_name(network: OnnxNetwork, inputs: ModelInputs) -> dict[str, torch.Tensor]:
    """Inputs by the names of the file, checked.

    Raises:
        DataError: naming the input that does not fit, with what was got and what is needed.
    """
    args, kwargs = call_arguments(inputs)
    given = network.given(args, kwargs)
    for declared in network.source.inputs:
        _check(declared, given[declared.name])
    return given


def _check(declared: Tensor, value: Any) -> None:
    where = f"input {declared.name!r}"
    if not isinstance(value, torch.Tensor):
        raise DataError(f"{where}: got {type(value).__name__}, needed a tensor")
    wanted = DTYPES.get(declared.dtype)
    if wanted is not None and value.dtype is not wanted:
        raise DataError(f"{where}: got {value.dtype}, needed {wanted}; convert it with .to({wanted})")
    shape = declared.shape
    if shape is not None and (
        len(shape) != value.dim()
        or any(isinstance(size, int) and size != own for size, own in zip(shape, value.shape, strict=True))
    ):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise DataError(f"{where}: got shape {tuple(value.shape)}, needed ({sizes})")


def made_up(network: OnnxNetwork) -> dict[str, torch.Tensor]:
    """Two examples of the declared types, the same each time.

    Raises:
        DataError: naming an input with a dynamic dimension beside the first.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for declared in network.source.inputs:
        shape = declared.shape
        if shape is None or any(not isinstance(size, int) for size in shape[1:]):
            sizes = "of any shape" if shape is None else f"of shape ({', '.join(map(str, shape))})"
            raise DataError(
                f"input {declared.name!r} is {sizes}, for which no example can be made up: give inputs=, a tensor, a "
                f"tuple or a dict of {', '.join(map(repr, network.input_names))}"
            )
        sizes_now = [size if isinstance(size, int) else EXAMPLES for size in shape]
        dtype = DTYPES.get(declared.dtype, torch.float32)
        if dtype.is_floating_point:
            found[declared.name] = torch.randn(sizes_now, generator=generator).to(dtype)
        else:
            found[declared.name] = torch.randint(0, 2, sizes_now, generator=generator).to(dtype)
    return found
