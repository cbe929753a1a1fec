"""Whether a training can begin, known before hours of work that come before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from halfstep.errors import DataError, NotObservedError, TrainingError, named
from halfstep.fake_quantize import Mode
from halfstep.graph.inputs import move
from halfstep.model import QuantizedModel
from halfstep.training.batches import check_dependence, check_iterable, outputs_loss, pair
from halfstep.training.checkpoint import own_randomness, seed_everything
from halfstep.training.distillation import check_gradient, compared
from halfstep.training.entry import entered
from halfstep.training.options import Training


def trainable(model: QuantizedModel) -> list[nn.Parameter]:
    """The float weights that train, after a look at whether the model can.

    Raises:
        TrainingError: if there are none, nothing is quantized, or a node without gradient is in the way.
        NotObservedError: if a site has no range.
    """
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise TrainingError(
            "the model is sharded (hs.shard), which is for a training loop of your own; hs.train and hs.quantize share "
            "a training among ranks by themselves: give them a whole model"
        )
    if model.mode is Mode.QUANTIZE:
        missing = [name for name, site in model.sites.items() if not site.calibrated]
        if missing:
            raise NotObservedError(
                f"{len(missing)} of {len(model.sites)} sites have no range ({', '.join(missing[:3])} ...): run "
                "observe() and calibrate() before training"
            )
        if not model.sites:
            raise TrainingError(
                "nothing is quantized: every layer is in float; there is nothing to train for"
            )
    weights = [
        p for name, p in model.named_parameters() if not name.startswith("quantizers.") and p.requires_grad
    ]
    if not weights:
        raise TrainingError(
            "the model has no trainable parameter: every one has requires_grad=False; call model.requires_grad_() "
            "before hs.prepare, or q.requires_grad_() after it"
        )
    if model.captured.origin is not None:
        from halfstep.onnx_in.islands import check_no_island  # onnx loads when it is needed

        check_no_island(model.graph, {name for name, p in model.named_parameters() if p.requires_grad})
    return weights


def check_trainable(model: QuantizedModel, training: Training) -> None:
    """Run the float network and the loss on the first batch, without a step; nothing is changed by it.

    Args:
        model: in whatever mode, calibrated or not.
        training: whose first batch is fetched, as its first epoch will. A generator loses none, since
            :class:`Training` keeps it as a list.

    Raises:
        TrainingError: if no parameter trains, the loss raises, is no finite number, or has no gradient, or distillation
            would be idle.
        DataError: if there is no batch, or the first one cannot be used.
    """
    check_iterable(training.labelled)
    with own_randomness(), _own_generators(training.labelled), model.using(Mode.FLOAT):
        trainable(model)
        seed_everything(training.seed)
        item = next(iter(training.labelled), None)
        if item is None:
            raise DataError("training data: got no batch, needed at least one (inputs, labels) pair")
        with named("training batch 0"):
            inputs, labels = move(pair(item, training), model.device)
            with (
                torch.enable_grad(),
                torch.autocast(model.device.type, training.autocast, enabled=training.autocast is not None),
            ):
                outputs = entered(model, training.forward)(inputs)
                loss = outputs_loss(training, outputs, labels)
                if training.loss is not None:
                    check_dependence(loss, outputs)
                if asked := training.distilled():
                    comparisons = compared(asked, outputs, training.loss, labels)
                    distance = torch.stack([each.loss(outputs, outputs) for each in comparisons]).sum()
                    if training.loss is None:
                        check_gradient(distance)
                    loss = loss + distance
            if not bool(torch.isfinite(loss)):
                raise TrainingError(
                    f"the loss of the float network is {loss.item()}, needed a finite number; look for NaN in the "
                    "data, and for labels that do not fit the outputs"
                )


@contextmanager
def _own_generators(data: Any) -> Iterator[None]:
    """Leave the generators of a DataLoader as they were."""
    sampler = getattr(data, "sampler", None)
    sources = (getattr(source, "generator", None) for source in (data, sampler))
    before = [(source, source.get_state()) for source in sources if isinstance(source, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)
