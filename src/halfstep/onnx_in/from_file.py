"""hs.from_onnx: an ONNX file as a module."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from halfstep.errors import DataError
from halfstep.graph.float32 import in_float32
from halfstep.graph.inputs import ModelInputs, batch_size, call_arguments
from halfstep.graph.shapes import BATCH
from halfstep.onnx_in.origin import Origin
from halfstep.onnx_in.table import DTYPES

if TYPE_CHECKING:
    from halfstep.onnx_in.reader import OnnxGraph, Tensor

#: Sizes of a batch that is made up.
EXAMPLES = 2


def from_onnx(path: str | Path, inputs: ModelInputs | None = None) -> nn.Module:
    """The network of an ONNX file as a module, which can be observed, quantized, repaired and trained like any other.

    Its parameters are called as the file's tensors are, its layers as the file's nodes (with underscores for quotes,
    backslashes and what is not printed). It takes the file's inputs in their order or by their names (those that Python
    can have; others with underscores), and returns the file's only output, or a dict of several. A first dimension that
    the file fixes becomes one of any size, since a batch of at least 2 is what networks are captured with, and half
    precision becomes float32; files that are written from here have it so too.

    Each node is run by itself on what ONNX Runtime has for its inputs, and its outputs are compared.

    Args:
        path: of the file; tensors beside it are read from its folder.
        inputs: a tensor, tuple or dict to compare on; None makes up two examples from the declared types: normal
            floats, and integers of 0 and 1.

    Raises:
        CaptureError: if the file cannot be read, has an operator that is not known, a node answers otherwise than
            ONNX Runtime, or a batch that the file fixes cannot have another size; the message names it.
        DataError: if the inputs do not fit the file's.

    >>> hs.prepare(hs.from_onnx("model.onnx"), torch.randn(2, 3, 224, 224))  # doctest: +SKIP
    """
    from halfstep.onnx_in.batch import fixed_batch, with_any_batch
    from halfstep.onnx_in.gate import check_nodes
    from halfstep.onnx_in.network import make_network
    from halfstep.onnx_in.precision import in_full_precision, said
    from halfstep.onnx_in.reader import read

    half = read(path)
    source = in_full_precision(half)
    if source is not half:
        source = said(source, half, made_up(source) if inputs is None else by_name(source, inputs))
    if fixed_batch(source):
        source = with_any_batch(source, made_up(source) if inputs is None else by_name(source, inputs))
    network = make_network(source)
    check_nodes(network, made_up(source) if inputs is None else by_name(source, inputs))
    return network


def layers_of(path: str | Path) -> list[str]:
    """What the layers of a file's network are called: its nodes with weights, in order.

    Raises:
        CaptureError: if the file cannot be read, or has an operator that is not known.
    """
    from halfstep.onnx_in.network import make_network
    from halfstep.onnx_in.precision import in_full_precision
    from halfstep.onnx_in.reader import read

    return make_network(in_full_precision(read(path))).layer_names


def opened(model: nn.Module | str | Path, inputs: ModelInputs | None) -> tuple[nn.Module, ModelInputs]:
    """A module and example inputs, where a file may be given for the one and nothing for the other.

    A single example for a file is given to its network twice, since a batch of at least 2 is what is captured.

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
    source: OnnxGraph = network.source
    if inputs is None:
        return network, tuple(made_up(source).values())
    inputs = in_float32(inputs, source.types)
    if batch_size(inputs) != 1:
        return network, inputs
    given = by_name(source, inputs)
    once = {id(given[value.name]) for value in source.inputs if not _fixed(value, 0)}

    def twice(x: Any) -> Any:
        return torch.cat([x, x]) if id(x) in once and x.dim() and len(x) == 1 else x

    return network, pytree.tree_map(twice, inputs)


def declared_axes(model: nn.Module, inputs: ModelInputs) -> list[dict[str, dict[int, str]]]:
    """The dimensions that the file of a network lets vary beside the batch, by input and dimension, as alternatives.

    First under the names that the file has for them; then those of one size in the inputs under one name, as files
    name dimensions apart that are always equal. Those of size 1, which tracing takes as fixed, are left out.

    Args:
        model: any; others than those of files have none.
        inputs: an example.
    """
    if (origin := origin_of(model)) is None:
        return []
    from halfstep.onnx_in.network import arguments

    source = origin.source
    given = by_name(source, inputs)
    called = {_called(value, d) for value in source.inputs for d in range(given[value.name].dim())}
    batch = BATCH if BATCH in called else _called(source.inputs[0], 0) if source.inputs else ""
    leads = bool(source.inputs) and _called(source.inputs[0], 0) == batch  # or the steps come first
    named: dict[str, dict[int, str]] = {}
    alike: dict[str, dict[int, str]] = {}
    first: dict[int, str] = {}
    for argument, value in zip(arguments(tuple(v.name for v in source.inputs)), source.inputs, strict=True):
        x = given[value.name]
        for dimension in range(x.dim()):
            name = _called(value, dimension)
            own = dimension > 0 or (name != batch and not (leads and len(x) == batch_size(inputs)))
            if name and own and x.shape[dimension] > 1:
                named.setdefault(argument, {})[dimension] = name
                alike.setdefault(argument, {})[dimension] = first.setdefault(x.shape[dimension], name)
    return [axes for axes in ([named] if named == alike else [named, alike]) if axes]


def _called(value: Tensor, dimension: int) -> str:
    """What a dimension that varies is called, in letters that a name may have; empty for one that is fixed."""
    if _fixed(value, dimension):
        return ""
    size = None if value.shape is None else value.shape[dimension]
    name = re.sub(r"\W", "_", f"{value.name}_{dimension}" if size is None else str(size))
    return f"_{name}" if name[0].isdigit() else name


def _fixed(value: Tensor, dimension: int) -> bool:
    return value.shape is not None and isinstance(value.shape[dimension], int)


def origin_of(model: nn.Module) -> Origin | None:
    """The file that a module was read from; None for any other module."""
    found = getattr(model, "origin", None)
    return found if isinstance(found, Origin) else None


def by_name(source: OnnxGraph, inputs: ModelInputs) -> dict[str, torch.Tensor]:
    """Inputs by the names of the file, checked.

    Raises:
        DataError: naming the input that does not fit, with what was got and what is needed.
    """
    from halfstep.onnx_in.batch import fixed_batch
    from halfstep.onnx_in.network import inputs_by_name

    args, kwargs = call_arguments(in_float32(inputs, source.types))
    given = inputs_by_name(source, args, kwargs)
    batch = fixed_batch(source)
    for declared in source.inputs:
        _check(declared, given[declared.name], batch)
    return given


def _check(declared: Tensor, value: Any, batch: int | None) -> None:
    where = f"input {declared.name!r}"
    if not isinstance(value, torch.Tensor):
        raise DataError(f"{where}: got {type(value).__name__}, needed a tensor")
    wanted = DTYPES.get(declared.dtype)
    if wanted is not None and value.dtype is not wanted:
        raise DataError(f"{where}: got {value.dtype}, needed {wanted}; convert it with .to({wanted})")
    shape = declared.shape
    if shape and batch is not None and shape[0] == batch and value.dim():
        shape = (None, *shape[1:])  # several batches, one after the other
    if shape is not None and (
        len(shape) != value.dim()
        or any(isinstance(size, int) and size != own for size, own in zip(shape, value.shape, strict=True))
    ):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise DataError(f"{where}: got shape {tuple(value.shape)}, needed ({sizes})")


def made_up(source: OnnxGraph) -> dict[str, torch.Tensor]:
    """Two examples of the declared types, the same each time.

    Raises:
        DataError: naming an input with a dynamic dimension beside the first.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for declared in source.inputs:
        shape = declared.shape
        if shape is None or any(not isinstance(size, int) for size in shape[1:]):
            sizes = "of any shape" if shape is None else f"of shape ({', '.join(map(str, shape))})"
            raise DataError(
                f"input {declared.name!r} is {sizes}, for which no example can be made up: give inputs=, a tensor, a "
                f"tuple or a dict of {', '.join(repr(value.name) for value in source.inputs)}"
            )
        sizes_now = [size if isinstance(size, int) else EXAMPLES for size in shape]
        dtype = DTYPES.get(declared.dtype, torch.float32)
        if dtype.is_floating_point:
            found[declared.name] = torch.randn(sizes_now, generator=generator).to(dtype)
        else:
            found[declared.name] = torch.randint(0, 2, sizes_now, generator=generator).to(dtype)
    return found
