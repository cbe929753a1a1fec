"""What the command line names: models and data, as ``package.module:callable`` or files."""

from __future__ import annotations

import importlib
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from halfstep.errors import ArgumentError, DataError, named
from halfstep.graph.capture import check_parameters
from halfstep.graph.float32 import hand_over, other_types
from halfstep.graph.inputs import ModelInputs, batch_size, call_arguments, tensors_of
from halfstep.onnx_in.from_file import from_onnx
from halfstep.progress import say

#: Under these names checkpoints of a training keep the state dict beside optimizers and counters.
_INSIDE = ("state_dict", "model_state_dict", "model", "net", "weights")


#: What the names of ONNX files end in.
ONNX = ".onnx"


#: How many names a message lists, and how many letters of another's message it holds.
_FEW, _LETTERS = 3, 300


def find_callable(
    name: str, needed: str = "package.module:callable, for instance my_package.models:resnet"
) -> Callable[..., Any]:
    """The callable that ``package.module:callable`` names; the current directory is searched too.

    Args:
        name: of the callable.
        needed: what to ask for where it is no such name.

    Raises:
        ArgumentError: saying which part of the name cannot be found.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ArgumentError(f"{name!r}: needed {needed}")
    if module_name.endswith(".py") or "/" in module_name:
        dotted = ".".join(Path(module_name).with_suffix("").parts).lstrip("./")
        raise ArgumentError(
            f"{name!r}: got the path of a file, needed the name that Python imports it by, as {dotted}:{attribute}"
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's code runs here and may raise anything
        raise ArgumentError(f"{name!r}: cannot import {module_name}: {_reason(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ArgumentError(f"{name!r}: {module_name} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentError(f"{name!r}: is a {type(found).__name__}, needed something to call")
    result: Callable[..., Any] = found
    return result


def load_model(name: str, weights: Path | None = None, example: ModelInputs | None = None) -> nn.Module:
    """Call ``name`` for a module, and load a state dict into it; or read the ONNX file of that name.

    Args:
        name: ``package.module:callable``, called without arguments; or the path of an ``.onnx`` file.
        weights: as for :func:`load_weights`.
        example: inputs that a file is held to ONNX Runtime on; some are made up without.

    Raises:
        ArgumentError: if it returns no module, or the weights do not fit.
        CaptureError: if a parameter is none that can be quantized, or a file cannot be taken.
        DataError: if the example does not fit a file.
    """
    if name.endswith(ONNX):
        if weights is not None:
            raise ArgumentError(f"weights {weights}: an ONNX file holds its own; leave them out")
        return from_onnx(name, example)
    model = _call(
        name,
        needed=f"package.module:callable, for instance my_package.models:resnet, or a file that ends in {ONNX}",
    )
    if not isinstance(model, nn.Module):
        several = "; several modules by name are quantized from Python, by hs.quantize" * isinstance(
            model, dict
        )
        raise ArgumentError(f"{name!r}: returned a {type(model).__name__}, needed a torch.nn.Module{several}")
    if weights is not None:
        load_weights(model, weights)
    with named(repr(name)):
        check_parameters(model)
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into ``model``, from a file of its own or the checkpoint of a training.

    A state dict inside a checkpoint is taken out, and a prefix that all names share and the model has not (``module.``
    of DataParallel, ``_orig_mod.`` of torch.compile) is taken off; both are said.

    Args:
        model: any.
        path: ``.safetensors``, or what torch saved (read with ``weights_only=True``).

    Raises:
        ArgumentError: if the file cannot be read, or with the names and shapes that do not fit.
    """
    state, where = _read_state(path), f"weights {path}"
    while inside := next((key for key in _INSIDE if isinstance(state.get(key), Mapping)), None):
        say(f"{where}: the state dict is its {inside!r}")
        state = state[inside]
    own = model.state_dict(keep_vars=True)
    while (prefix := _prefix(state)) and not own.keys() & state.keys():
        say(f"{where}: {prefix!r} is taken off every name")
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    found = [
        name
        for name, value in own.items()
        if isinstance(value, torch.Tensor) and isinstance(state.get(name), torch.Tensor)
    ]
    shapes = [
        f"{name!r} is {tuple(state[name].shape)}, needed {tuple(own[name].shape)}"
        for name in found
        if state[name].shape != own[name].shape
    ]
    missing: list[str] = []
    unknown: list[str] = []
    if not shapes:
        try:
            missing, unknown = model.load_state_dict(state, strict=False)
        except Exception as error:  # a module may load its state in its own way
            raise ArgumentError(f"{where}: {_reason(error)}") from error
        loaded = {id(own[name]) for name in found}
        missing = [
            name for name in missing if id(own[name]) not in loaded
        ]  # but for second names of tied ones
    wrong = [
        _few(shapes, "another shape"),
        _few([repr(name) for name in missing], "missing"),
        _few([repr(name) for name in unknown], "unknown to the model"),
    ]
    if any(wrong):
        raise ArgumentError(f"{where}: do not fit {type(model).__name__}: {'; '.join(filter(None, wrong))}")


def _read_state(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ArgumentError(f"weights {path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise ArgumentError(
            f"weights {path}: is no file of tensors alone, and nothing else is loaded, since it could run code; save "
            "the state dict: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # torch, zipfile and safetensors raise a dozen kinds
        raise ArgumentError(
            f"weights {path}: cannot be read: {_reason(error)}; needed .safetensors, or what "
            "torch.save(model.state_dict(), path) writes"
        ) from error
    if not isinstance(state, Mapping):
        raise ArgumentError(
            f"weights {path}: holds a {type(state).__name__}, needed a state dict: names and tensors"
        )
    return state


def _prefix(state: Mapping[str, Any]) -> str:
    """The first part of all names, with its dot, if they share it."""
    heads = {str(name).partition(".")[::2] for name in state}
    firsts = {first for first, _ in heads}
    return f"{firsts.pop()}." if len(firsts) == 1 and all(rest for _, rest in heads) else ""


def _few(items: Sequence[str], what: str) -> str:
    """So many are something, and the first of them."""
    if not items:
        return ""
    more = ", ..." if len(items) > _FEW else ""
    return f"{len(items)} {what} ({', '.join(items[:_FEW])}{more})"


def check_input(model: nn.Module, inputs: ModelInputs, source: str) -> None:
    """See that ``model`` takes the first examples of the data, and that they are numbers.

    Args:
        model: in evaluation mode.
        inputs: the first batch.
        source: what to call the data in a message.

    Raises:
        DataError: with the model's own words and what was given to it, or how many values are NaN.
    """
    with named(source):
        args, kwargs = call_arguments(_first_of(inputs, 2))
    for tensor in tensors_of(inputs):
        if bad := int(torch.isnan(tensor).sum()):
            raise DataError(f"{source}: {bad} of the first batch's {tensor.numel()} values are NaN")
    types = other_types(model)
    try:
        if types:
            hand_over(model, types, args, kwargs)
        else:
            with torch.no_grad():
                model(*args, **kwargs)
    except Exception as error:  # the user's code, and torch's
        tensors = tensors_of((args, kwargs))
        given = ", ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in tensors)
        advice = ""
        if isinstance(error, TypeError):
            advice = "; a batch holds the arguments of the model's forward, and no labels"
        elif not all(tensor.is_floating_point() for tensor in tensors):
            advice = (
                "; images are to be float32, scaled as in the training, for instance (inputs / 255 - mean) / std, and "
                "indices int64"
            )
        raise DataError(f"{source}: the model does not take {given}: {_reason(error)}{advice}") from error


def load_labelled(name: str, batch: int) -> Iterable[Any]:
    """Labelled batches: from an ``.npz`` with ``inputs`` and ``labels``, or from a callable.

    Files that are not compressed stay on the disk until a batch is used. Floats become float32, in which models
    compute, which is said. Other labels become int64.

    Args:
        name: of the file, or ``package.module:callable``; see :func:`load_inputs`.
        batch: examples in a batch of a file.

    Raises:
        DataError: if the file cannot be read, lacks an array, or holds Python objects.
    """
    if not name.endswith(".npz"):
        return _batches(name, batch)
    arrays = _read_npz(Path(name), ("inputs", "labels"))
    inputs, labels = arrays["inputs"], arrays["labels"]
    if len(inputs) != len(labels):
        raise DataError(
            f"{name}: has {len(inputs)} inputs but {len(labels)} labels; needed one label an input"
        )
    inputs = _as_float(inputs, f"{name}: inputs")
    labels = _as_float(labels, f"{name}: labels")
    if not labels.is_floating_point() and labels.dtype is not torch.bool:
        labels = labels.long()
    return list(zip(inputs.split(batch), labels.split(batch), strict=True))


def load_inputs(name: str, batch: int, limit: int | None) -> Iterable[Any]:
    """Batches without labels: from an ``.npz`` with ``inputs``, or from a callable.

    A callable is used as it is: what it returns is iterated for every pass over the data, and where that can be
    iterated only once (a generator), the callable is called anew. A ``Dataset`` and a tensor are put into batches.

    Args:
        name: of the file, or ``package.module:callable``.
        batch: examples in a batch of a file, dataset or tensor.
        limit: at most so many examples, the first ones; None for all.

    Raises:
        DataError: as :func:`load_labelled`.
    """
    if not name.endswith(".npz"):
        batches = _batches(name, batch)
        return batches if limit is None else _First(name, batches, limit)
    inputs = _read_npz(Path(name), ("inputs",))["inputs"][:limit]
    return list(_as_float(inputs, f"{name}: inputs").split(batch))


def _call(name: str, **options: str) -> Any:
    function = find_callable(name, **options)
    try:
        return function()
    except (Exception, SystemExit) as error:  # the user's code, again
        raise ArgumentError(f"{name!r}: raised {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """An exception's kind, and the beginning of its text in one line if it has any."""
    words = " ".join(str(error).split())
    if len(words) > _LETTERS:
        words = f"{words[:_LETTERS]} ..."
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _batches(name: str, batch: int) -> Iterable[Any]:
    """What a callable returns, as something that can be iterated again and again."""
    data = _call(
        name, needed="an .npz file, or package.module:callable, for instance my_package.data:batches"
    )
    if isinstance(data, Iterator):
        return _Anew(name, data)
    if isinstance(data, torch.Tensor) and data.dim():
        parts: Iterable[Any] = data.split(batch)
        return parts
    if isinstance(data, Iterable):
        return data
    if isinstance(data, Dataset):
        loader: DataLoader[Any] = DataLoader(data, batch)
        return loader
    raise ArgumentError(f"{name!r}: returned a {type(data).__name__}, needed an iterable of batches")


class _Anew:
    """The batches of a callable that returns an iterator, which serves one pass: it is called anew for each."""

    def __init__(self, name: str, first: Iterator[Any]) -> None:
        self._name, self._first = name, [first]

    def __iter__(self) -> Iterator[Any]:
        again = not self._first
        batches = _call(self._name) if again else self._first.pop()
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if again and empty:
            raise DataError(
                f"{self._name!r}: gave no batch when it was called again: the iterator that it returns is used up; "
                "begin anew in each call, or return a list or a loader"
            )


class _First:
    """The first examples of batches, the last batch cut to fit."""

    def __init__(self, name: str, batches: Iterable[Any], limit: int) -> None:
        self._name, self._batches, self._limit = name, batches, limit

    def __iter__(self) -> Iterator[Any]:
        left = self._limit
        for index, batch in enumerate(self._batches):
            with named(f"{self._name!r}, batch {index}"):
                size = batch_size(batch)
            yield batch if size <= left else _first_of(batch, left)
            left -= size
            if left <= 0:
                return


def _first_of(batch: Any, count: int) -> Any:
    """The first examples of a batch; what has no batch stays whole."""
    size = batch_size(batch)
    return pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor[:count] if tensor.dim() and len(tensor) == size else tensor, batch
    )


def _as_float(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Floats as float32: numpy makes 64 bits unless told otherwise."""
    if not tensor.is_floating_point() or tensor.dtype is torch.float32:
        return tensor
    say(f"{what} are {tensor.dtype}: converted to torch.float32, which the model computes in")
    return tensor.float()


def _read_npz(path: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                advice = ""
                if missing[0] == "inputs" and len(file.files) > 1:
                    advice = (
                        "; for a network of several inputs give package.module:callable, which makes "
                        "batches of dicts"
                    )
                raise DataError(
                    f"{path}: has no array {missing[0]!r}; it has {', '.join(map(repr, file.files)) or 'none'}{advice}"
                )
            tensors = {name: torch.from_numpy(_array(path, file, name)) for name in names}
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except DataError:
        raise
    except (
        Exception
    ) as error:  # numpy raises half a dozen kinds for a broken zip, a bad header, pickled objects
        raise DataError(f"{path}: cannot be read as an .npz of plain arrays: {_reason(error)}") from error
    for name, tensor in tensors.items():
        if not tensor.dim() or not len(tensor):
            raise DataError(
                f"{path}: array {name!r} has shape {tuple(tensor.shape)}, needed at least one example"
            )
    return tensors


def _array(path: Path, file: Any, name: str) -> np.ndarray:
    """An array of an ``.npz``: mapped into memory where it lies there as it is, else read.

    The layout is the zip format's (a local header of 30 bytes and two names, then the file) and numpy's (a header, then
    the values). Changes of a mapped array are this process's own.
    """
    member = file.zip.getinfo(f"{name}.npy")
    if member.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as raw:
            raw.seek(member.header_offset + 26)
            raw.seek(sum(struct.unpack("<HH", raw.read(4))), 1)
            version = np.lib.format.read_magic(raw)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(raw)
                start = raw.tell()
                if not (fortran or dtype.hasobject or start % dtype.alignment) and np.prod(shape):
                    return np.memmap(path, dtype, "c", start, shape)
    array: np.ndarray = file[name]
    return array
