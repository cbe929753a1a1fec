"""Cross-layer equalization: weights that write a channel and weights that read it get the same range."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from halfstep.graph.inputs import ModelInputs
from halfstep.model import QuantizedModel
from halfstep.repair.channels import Channels, Port, find_channels
from halfstep.repair.ranges import sample_of
from halfstep.repair.record import Repair
from halfstep.repair.scaling import rows_of, scaled

#: Sweeps over chains of layers at most, until one scales nothing; a few settle most networks.
SWEEPS = 100


def equalize(model: QuantizedModel, batches: Iterable[ModelInputs] | None = None) -> Repair:
    """Equalize the ranges of weights across layers, through positively homogeneous operators only.

    With ``w`` the largest weight (or bias, a weight of the input 1) that writes a channel and ``r`` the largest that
    reads it, what writes is divided by ``sqrt(w / r)`` and what reads multiplied by it: both ranges become
    ``sqrt(w r)``. The float function stays the same; the float parameters change. Residual sums are scaled as one,
    with all that writes and reads them. Channels that are read by anything else (a GELU, a ReLU6, a layer norm, an
    output of the network) are left alone, and the record says why; so are channels that are zero on either side.

    Layers share channels with their neighbours, so it goes over all of them again and again, until nothing is scaled by
    more than 0.1%; a note says where :data:`SWEEPS` do not suffice.

    Activations that were scaled are observed again on the sample, and their calibrators asked again. These may have
    been chosen for what is no longer: :func:`~halfstep.repair` chooses them anew, after this function it is
    ``hs.calibrate(q, hs.best_of())`` that does.

    Args:
        model: observed.
        batches: model inputs; the sample that the model kept if None.

    Raises:
        DataError: if there are no inputs.

    Source: Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", 2019, section 4.1, with the iteration until convergence; the residual sums, biases, the tolerance and
    the bound are ours.
    """
    inputs = sample_of(model, batches)
    classes = [c for c in find_channels(model.graph) if not any(port.norm for port in c.writers)]

    def choose(channels: Channels) -> tuple[Tensor, float, float]:
        written = _reach(model, channels.writers, channels.size)
        read = _reach(model, channels.readers, channels.size)
        alive = (written > 0) & (read > 0)
        ratio = torch.where(alive, written / torch.where(alive, read, 1.0), 1.0)
        return ratio.sqrt(), float(torch.maximum(ratio, 1 / ratio).max()), 1.0

    return scaled(
        model,
        "equalization",
        "largest ratio of the weights on the two sides of a channel",
        classes,
        choose,
        inputs,
        SWEEPS,
    )


def _reach(model: QuantizedModel, ports: list[Port], size: int) -> Tensor:
    """The largest magnitude on one side of each channel, float64."""
    reach = torch.zeros(size, dtype=torch.float64)
    for port in ports:
        rows = rows_of(model.weight(port.weight).detach(), port, size).double().abs().cpu()
        reach = torch.maximum(reach, rows.amax(1))
        if port.bias is not None:
            reach = torch.maximum(reach, model.weight(port.bias).detach().double().abs().cpu())
    return reach
