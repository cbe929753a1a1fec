"""Everything a training needs to go on, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from halfstep.errors import RunError

Tensors = dict[str, torch.Tensor]

#: The file's name in a run's directory.
FILE = "training.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A training after some steps.

    Attributes:
        position: step, losses, scores ... as plain data.
        parts: state dicts by name: model, best model, optimizer, random states.
    """

    position: dict[str, Any]
    parts: dict[str, Tensors]

    def save(self, path: Path, fingerprint: str) -> None:
        """Write it; the file appears whole or not at all.

        Raises:
            RunError: if it cannot be written.
        """
        tensors = {
            f"{part}/{name}": tensor.detach().cpu().contiguous().clone()
            for part, state in self.parts.items()
            for name, tensor in state.items()
        }
        metadata = {"fingerprint": fingerprint, "position": json.dumps(self.position)}
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot write {path}: {error}; choose a directory you own, with space") from error

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Checkpoint | None:
        """Read it; None if there is none.

        Raises:
            RunError: if the file cannot be read, or is of another training.
        """
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot read {path}: {error}; delete it to train from the start") from error
        if metadata.get("fingerprint") != fingerprint:
            raise RunError(
                f"{path} is the checkpoint of another training: its network, ranges or options differ; choose another "
                "directory, or delete the file to train from the start"
            )
        parts: dict[str, Tensors] = {}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = tensor
        return cls(json.loads(metadata["position"]), parts)


def fingerprint(state: Mapping[str, torch.Tensor], options: Mapping[str, str]) -> str:
    """A digest of where a training starts and what it is told."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """An optimizer's state as tensors, ``"<index>.<name>"``; learning rates follow from the step."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Undo :func:`optimizer_tensors`, for an optimizer of the same groups."""
    state: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
