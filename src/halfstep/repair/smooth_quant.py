"""Migration: channels with large activations are divided, and the weights that read them multiplied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from halfstep import functional
from halfstep.calibrators import MSE
from halfstep.calibrators.calibrator import Calibrator, WeightCalibrator
from halfstep.fake_quantize import FakeQuantize
from halfstep.granularity import PerTensor
from halfstep.graph.inputs import ModelInputs
from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel
from halfstep.repair.channels import Channels, Port, find_channels
from halfstep.repair.equalize import rows_of, scale_port, scaled
from halfstep.repair.moments import LayerWeight, as_rows, patches, why_not_rounded
from halfstep.repair.ranges import sample_of
from halfstep.repair.record import Repair
from halfstep.repair.walk import walk
from halfstep.statistics import Histogram

#: The part of a channel's range that the weights take over: 0 evens out the weights, 1 the activations.
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

#: Positions on which a layer's output error is compared.
POSITIONS = 2048


def migrate(
    model: QuantizedModel,
    batches: Iterable[ModelInputs] | None = None,
    strengths: Iterable[float] = STRENGTHS,
) -> Repair:
    """Even out the channels of activations at the cost of the weights that read them, as far as that pays.

    With ``a`` the largest magnitude of a channel and ``w`` that of the weights that read it, the channel is divided by
    ``a^t / w^(1 - t)``: in the weight and bias of the layer norm (or layer) that writes it, so nothing is computed at
    run time. Of all strengths t, and of doing nothing, each class of channels gets what leaves the least error in the
    outputs of the layers that read it, their weights and inputs quantized. The float function stays the same.

    Where a layer with one scale for its whole weight writes the channels they are left alone: that weight would pay.

    Args:
        model: calibrated.
        batches: model inputs; the sample that the model kept if None.
        strengths: to try, each from 0 to 1.

    Raises:
        DataError: if there are no inputs.

    Source: Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for
    Large Language Models", 2022, section 4; the search for t is ours.
    """
    inputs = sample_of(model, batches)
    classes = find_channels(model.graph)
    layers = {layer.operator.node: layer for layer in model.layers}
    wanted = {port.node for c in classes if c.scalable for port in c.readers}
    seen = {
        step.layer.operator.node: _some_rows(step.layer, step.float_inputs)
        for step in walk(model, inputs, "migration")
        if step.layer.operator.node in wanted and not why_not_rounded(model, step.layer)
    }
    for channels in classes:
        if channels.scalable:
            channels.barrier = _obstacle(model, channels, seen)
    grid = tuple(strengths)

    def choose(channels: Channels) -> tuple[Tensor, float, float]:
        readers = [
            _Reader.of(model, layers[port.node], port, seen[port.node])
            for port in channels.readers
            if port.node in seen
        ]
        return _choose(readers, channels.size, grid)

    measure = "relative squared error of the outputs of the layers that read the channels"
    return scaled(model, "migration", measure, classes, choose, inputs)


def _obstacle(model: QuantizedModel, channels: Channels, seen: Mapping[fx.Node, Tensor]) -> str:
    """Why channels that could be scaled are not; empty if they are."""
    if not any(port.node in seen for port in channels.readers):
        return "no quantized layer reads it"
    for port in channels.writers:
        site = model.sites.get(port.weight)
        if site is not None and isinstance(site.granularity, PerTensor):
            return f"{port.name!r}, which writes it, has one scale for its whole weight"
    return ""


def _some_rows(layer: Layer, inputs: list[Tensor]) -> Tensor:
    """Inputs of a layer as rows, (groups, positions, inputs), evenly taken from all batches."""
    rows = [patches(layer.operator, x) for x in inputs]
    count = max(1, POSITIONS // len(rows))
    return torch.cat([each[:, :: max(1, each.shape[1] // count)] for each in rows], 1)


@dataclass(frozen=True)
class _Reader:
    """A layer that reads the channels, with what it takes to quantize both its sides.

    Attributes:
        weight: its weight.
        port: where the channels meet it.
        rows: float inputs, (groups, positions, inputs).
        activations: the quantizer of its input; None where that stays in float.
        wanted: its float outputs, without bias.
    """

    weight: LayerWeight
    port: Port
    rows: Tensor
    activations: FakeQuantize | None
    wanted: Tensor

    @classmethod
    def of(cls, model: QuantizedModel, layer: Layer, port: Port, rows: Tensor) -> _Reader:
        weight = LayerWeight.of(model, layer)
        names = [name for name in layer.sites if name != weight.site.name]
        activations = model.sites[names[0]] if names else None
        return cls(weight, port, rows, activations, rows @ weight.rows().mT)

    def reach(self, size: int) -> tuple[Tensor, Tensor]:
        """The largest input and the largest weight of each channel."""
        inputs = self.rows.abs().amax(1)  # (groups, inputs)
        taps = inputs.shape[1] * inputs.shape[0] // (size * self.port.repeat)
        return inputs.reshape(size, self.port.repeat * taps).amax(1), rows_of(
            self.weight.tensor, self.port, size
        ).abs().amax(1)

    def error(self, factors: Tensor) -> float:
        """What quantization does to the outputs, relative to them, once the channels are divided by ``factors``."""
        tensor = self.weight.tensor.clone()
        scale_port(tensor, self.port, factors)
        site = self.weight.site
        calibrator = site.calibrated_by or MSE()
        assert isinstance(calibrator, WeightCalibrator)
        weight = _quantized(site, tensor, *calibrator.weight_range(tensor, site.format, site.granularity))
        groups, _, inputs = self.rows.shape
        each = factors.repeat_interleave(self.port.repeat).to(self.rows)
        taps = groups * inputs // len(each)
        rows = self.rows / each.repeat_interleave(taps).reshape(groups, 1, inputs)
        if self.activations is not None and self.activations.dynamic:
            rows = self.activations.rounded(rows)
        elif self.activations is not None:
            how = self.activations.calibrated_by or MSE()
            assert isinstance(how, Calibrator)
            # All rows count as one batch where ranges of batches are asked for.
            histogram = Histogram(batch_ranges=self.activations.histogram.keeps_batch_ranges)
            histogram.update(rows)
            low, high = how.range(histogram, self.activations.format)
            rows = _quantized(self.activations, rows, torch.tensor(low), torch.tensor(high))
        got = rows @ as_rows(self.weight.op, weight).mT
        return float((got - self.wanted).square().sum() / self.wanted.square().sum().clamp_min(1e-30))


def _quantized(site: FakeQuantize, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Values as the site would quantize them at another range."""
    scale, zero_point = site.format.parameters(low.to(values.device), high.to(values.device))
    granularity = site.granularity if scale.dim() else PerTensor()
    return functional.fake_quantize(values, scale, zero_point, site.format, granularity)


def _choose(readers: list[_Reader], size: int, strengths: tuple[float, ...]) -> tuple[Tensor, float, float]:
    """The factors of least error over all readers, the error without any, and that with them."""
    reaches = [reader.reach(size) for reader in readers]
    inputs = torch.stack([reach for reach, _ in reaches]).amax(0).double()
    weights = torch.stack([reach for _, reach in reaches]).amax(0).double()
    alive = (inputs > 0) & (weights > 0)
    best = torch.ones(size, dtype=torch.float64, device=inputs.device)
    before = least = sum(reader.error(best) for reader in readers)
    if not bool(alive.any()):
        return best, before, least
    for strength in strengths:
        logs = strength * inputs.log2() - (1 - strength) * weights.log2()
        logs = torch.where(alive, logs - logs[alive].mean(), 0.0)
        error = sum(reader.error(logs.exp2()) for reader in readers)
        if error < least:
            best, least = logs.exp2(), error
    return best, before, least
