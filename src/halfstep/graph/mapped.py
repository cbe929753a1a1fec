"""A module whose tensors are mapped from files: read where they are used, and dropped from memory when it is short."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from halfstep.errors import ArgumentError

#: Names are shown up to so many.
SHOWN = 3


def mapped(model: nn.Module, files: str | Path | Iterable[str | Path]) -> nn.Module:
    """A copy of ``model`` with the tensors that files hold in the place of its own.

    The files are mapped into memory, privately: what is changed of a tensor later takes memory, and no file changes.
    Tensors that the model has under several names may be in the files under one of them.

    Args:
        model: made without memory, under ``torch.device("meta")``; what it has in memory is copied.
        files: of safetensors; their tensors together are all that is on the device meta.

    Raises:
        ArgumentError: a file that cannot be read, a name that the model has not, another shape, or what no file holds.
    """
    twin = copy.deepcopy(model)
    own = twin.state_dict(keep_vars=True)
    state: dict[str, Tensor] = {}
    for file in [files] if isinstance(files, (str, Path)) else files:
        found = _read(Path(file))
        if strange := [name for name in found if name not in own]:
            raise ArgumentError(
                f"weights: {file} holds {_some(strange)}, which {type(model).__name__} has not; needed the names of "
                f"its state dict, such as {_some(list(own))}"
            )
        for name, tensor in found.items():
            if tensor.shape != own[name].shape:
                raise ArgumentError(
                    f"weights: {file} holds {name!r} of shape {tuple(tensor.shape)}, needed {tuple(own[name].shape)} "
                    f"as {type(model).__name__} has it"
                )
        state |= found
    first: dict[int, str] = {}
    for name in state:
        first.setdefault(id(own[name]), name)
    tied = {name: first[id(tensor)] for name, tensor in own.items() if id(tensor) in first}
    twin.load_state_dict(state, strict=False, assign=True)
    for name, other in tied.items():
        if name != other:
            _put(twin, name, other)
    missing = [name for name, tensor in (*twin.named_parameters(), *twin.named_buffers()) if tensor.is_meta]
    if missing:
        raise ArgumentError(
            f"weights: no file holds {_some(missing)}, which {type(model).__name__} has without memory (on the device "
            "meta); give all files, and make buffers that no state dict keeps (persistent=False) with memory"
        )
    return twin


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ArgumentError(
            f"weights: {file} cannot be read: {error}; needed a file of safetensors"
        ) from error
    return found


def _put(module: nn.Module, name: str, other: str) -> None:
    """Let a name stand for the very tensor that another one does."""
    owner, _, key = other.rpartition(".")
    source = getattr(module.get_submodule(owner), key)
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, source)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def on_meta(model: nn.Module) -> bool:
    """Whether a module has a parameter or buffer without memory."""
    return any(tensor.device == torch.device("meta") for tensor in (*model.parameters(), *model.buffers()))
