"""The random states that data and losses draw from: torch's, numpy's and Python's."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch (every device), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, torch.Tensor]:
    """Every random state, as tensors that a checkpoint can hold."""
    name, keys, *rest = np.random.get_state(legacy=True)
    plain = json.dumps([random.getstate(), name, np.asarray(keys).tolist(), rest])
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(list(plain.encode()), dtype=torch.uint8),
    }
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
