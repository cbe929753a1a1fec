"""What the command line names: models and data, as ``package.module:callable`` or files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from halfstep.errors import ArgumentError, DataError


def find_callable(name: str) -> Callable[..., Any]:
    """The callable that ``package.module:callable`` names; the current directory is searched too.

    Raises:
        ArgumentError: saying which part of the name cannot be found.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ArgumentError(
            f"{name!r}: needed package.module:callable, for instance my_package.models:resnet"
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's code runs here and may raise anything
        raise ArgumentError(
            f"{name!r}: cannot import {module_name}: {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ArgumentError(f"{name!r}: {module_name} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentError(f"{name!r}: is a {type(found).__name__}, needed something to call")
    result: Callable[..., Any] = found
    return result


def load_model(name: str, weights: Path | None = None) -> nn.Module:
    """Call ``name`` for a module, and load a state dict into it.

    Args:
        name: ``package.module:callable``; called without arguments.
        weights: ``.safetensors``, or a state dict saved by torch (read with ``weights_only=True``).

    Raises:
        ArgumentError: if it returns no module, or the weights do not fit.
    """
    model = _call(name)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{name!r}: returned a {type(model).__name__}, needed a torch.nn.Module")
    if weights is not None:
        try:
            if weights.suffix == ".safetensors":
                from safetensors.torch import load_file

                state = load_file(weights)
            else:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            model.load_state_dict(state)
        except Exception as error:
            raise ArgumentError(f"weights {weights}: {str(error).strip().splitlines()[0]}") from error
    return model.eval()


def load_labelled(name: str, batch: int) -> list[tuple[Any, Any]]:
    """Labelled batches: from an ``.npz`` with ``inputs`` and ``labels``, or from a callable.

    Raises:
        DataError: if the file cannot be read, lacks an array, or holds Python objects.
    """
    if not name.endswith(".npz"):
        return list(_iterable(name))
    arrays = _read_npz(Path(name), ("inputs", "labels"))
    inputs, labels = arrays["inputs"], arrays["labels"]
    if len(inputs) != len(labels):
        raise DataError(
            f"{name}: has {len(inputs)} inputs but {len(labels)} labels; needed one label an input"
        )
    return list(zip(inputs.split(batch), labels.split(batch), strict=True))


def load_inputs(name: str, batch: int, limit: int) -> list[Any]:
    """Calibration batches: from an ``.npz`` with ``inputs`` (its first ``limit`` examples), or from a callable."""
    if not name.endswith(".npz"):
        return list(_iterable(name))
    return list(_read_npz(Path(name), ("inputs",))["inputs"][:limit].split(batch))


def _call(name: str) -> Any:
    function = find_callable(name)
    try:
        return function()
    except Exception as error:  # the user's code, again
        raise ArgumentError(f"{name!r}: raised {type(error).__name__}: {error}") from error


def _iterable(name: str) -> Iterable[Any]:
    data = _call(name)
    if not isinstance(data, Iterable):
        raise ArgumentError(f"{name!r}: returned a {type(data).__name__}, needed an iterable of batches")
    return data


def _read_npz(path: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                raise DataError(
                    f"{path}: has no array {missing[0]!r}; it has {', '.join(map(repr, file.files)) or 'none'}"
                )
            tensors = {name: torch.from_numpy(file[name]) for name in names}
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except DataError:
        raise
    except (
        Exception
    ) as error:  # numpy raises half a dozen kinds for a broken zip, a bad header, pickled objects
        raise DataError(f"{path}: cannot be read as an .npz of plain arrays: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.dim() or not len(tensor):
            raise DataError(
                f"{path}: array {name!r} has shape {tuple(tensor.shape)}, needed at least one example"
            )
    return tensors
