"""Everything a training needs to go on, in one safetensors file, with the random states it draws from.

The random states that data and losses draw from: torch's, numpy's and Python's.
"""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from halfstep.errors import RunError
from halfstep.files import appearing
from halfstep.identity import Identity
from halfstep.training.options import Training


def seed_everything(seed: int) -> None:
    """Seed torch (every device), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, torch.Tensor]:
    """Every random state, as tensors that a checkpoint can hold."""
    name, keys, *rest = np.random.get_state(legacy=True)
    plain = json.dumps([random.getstate(), name, np.asarray(keys).tolist(), rest])
    state = {"torch": torch.get_rng_state(), "python": torch.tensor(list(plain.encode()), dtype=torch.uint8)}
    if torch.cuda.is_available():
        state |= {f"cuda{index}": each for index, each in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Go on from a state of :func:`random_state`; devices that were not there keep theirs."""
    torch.set_rng_state(state["torch"].cpu())
    python, name, keys, rest = json.loads(bytes(state["python"].tolist()))
    random.setstate((python[0], tuple(python[1]), python[2]))
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    for index in range(torch.cuda.device_count()):
        if f"cuda{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda{index}"].cpu(), index)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leave the caller's random states as they were."""
    before = random_state()
    try:
        yield
    finally:
        restore_random_state(before)


Tensors = dict[str, torch.Tensor]

#: The file's name in a run's directory.
FILE = "training.safetensors"


class OtherTraining(RunError):
    """A checkpoint of a training that started elsewhere, or was told otherwise."""


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
        try:
            with appearing(path) as temporary:
                save_file(tensors, temporary, metadata)
                if path.exists():
                    os.replace(path, before(path))
        except SafetensorError as error:
            raise RunError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Checkpoint | None:
        """Read it, or the one before it where it cannot be read; None if there is none.

        Raises:
            OtherTraining: if the file is of another training.
            RunError: if neither file can be read.
        """
        errors = []
        for place in (path, before(path)):
            if not place.exists():
                continue
            try:
                with safe_open(place, "pt") as file:
                    metadata = file.metadata() or {}
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                break
            except (OSError, SafetensorError) as error:
                errors.append(f"cannot read {place}: {error}")
        else:
            if not errors:
                return None
            raise RunError(f"{'; '.join(errors)}; delete it to train from the start")
        if metadata.get("fingerprint") != fingerprint:
            raise OtherTraining(
                f"{place} is the checkpoint of another training: its network, ranges, options, loss or data differ; "
                "choose another directory, or delete the file to train from the start"
            )
        if errors:
            warnings.warn(f"{errors[0]}: going on from the checkpoint before it", stacklevel=2)
        parts: dict[str, Tensors] = {}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = tensor
        return cls(json.loads(metadata["position"]), parts)


def before(path: Path) -> Path:
    """The place of the checkpoint before the one at ``path``."""
    return path.with_name(f"{path.stem}.before{path.suffix}")


def fingerprint(state: Mapping[str, torch.Tensor], training: Training) -> str:
    """A digest of where a training starts and what it is told."""
    return Identity(sorted(state.items()), training.identity().digest).digest


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
