"""A trained network with what its user would hand over; trained once, weights in ``bench/cache``, outside git."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from halfstep.evaluate.score import DataMetric
from halfstep.graph.inputs import ModelInputs
from halfstep.graph.padding import Mask
from halfstep.graph.shapes import Dynamic

CACHE = Path(__file__).parents[1] / "cache"


@dataclass(frozen=True)
class Task:
    """What :func:`halfstep.quantize` is given, and what its peers are told.

    Attributes:
        model: in evaluation mode.
        calibration: batches of inputs, of which none is in the metric or was trained on.
        metric: over test data, 1 the most or the worst that there is; ``max_drop`` is 0.01 on all.
        dynamic: what varies beside the batch.
        padding: the input that tells what only fills up.
        transformer: NNCF is told that it is one.
        dynamic_peer: ONNX Runtime's documents recommend ranges at run time: of transformers and recurrent networks.
    """

    model: nn.Module
    calibration: list[ModelInputs]
    metric: DataMetric
    dynamic: Dynamic | None = None
    padding: Mask | None = None
    transformer: bool = False
    dynamic_peer: bool = False

    @property
    def example(self) -> ModelInputs:
        return self.calibration[0]


def trained(name: str, model: nn.Module, train: Callable[[nn.Module], None], seed: int = 0) -> nn.Module:
    """``model`` with the weights that ``train`` gave it when it was first asked for, in evaluation mode."""
    file = CACHE / f"{name}-{seed}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    start = time.perf_counter()
    torch.manual_seed(seed)
    train(model.train())
    CACHE.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
    print(f"{name}: trained in {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


def fit(
    model: nn.Module,
    batches: Callable[[int], list[tuple[ModelInputs, object]]],
    loss: Callable[..., torch.Tensor],
    epochs: int,
    rate: float,
) -> None:
    """AdamW with a one-cycle schedule; a line an epoch.

    Args:
        model: in training mode.
        batches: the ``(inputs, labels)`` of an epoch.
        loss: of the model's outputs and the labels.
        epochs: how often.
        rate: the highest learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    first = batches(0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(first))
    for epoch in range(epochs):
        total, start = 0.0, time.perf_counter()
        for inputs, labels in first if epoch == 0 else batches(epoch):
            outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
            value = loss(outputs, labels)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += value.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1} of {epochs}: loss {total / len(first):.4f}, {seconds:.0f} s", flush=True)
