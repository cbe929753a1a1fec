"""The modules on a network's sites and biases, kept for every precision that its layers had.

With other layers in float, or at other widths, there are other sites. Whatever was there before keeps its statistics
and ranges, and is itself again when it comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import fx, nn

from halfstep.bias_shift import BiasShift, BiasSteps
from halfstep.calibrators import MSE
from halfstep.fake_quantize import FakeQuantize, RunTimeQuantize
from halfstep.formats import Integer
from halfstep.graph.operators import describe, readable_names
from halfstep.graph.placement import WIDTH, Placement, Site
from halfstep.targets import Target


class KnownQuantizers:
    """The quantizers and shifts of biases that a model has had.

    Args:
        graph: the float graph.
        target: whose passes move codes about.
        weight: a parameter, by name.

    Attributes:
        modules: by key.
        keys: from sites to their quantizers' keys.
    """

    def __init__(self, graph: fx.Graph, target: Target, weight: Callable[[str], torch.Tensor]) -> None:
        self.target, self.weight = target, weight
        self.modules: dict[str, nn.Module] = {}
        self.keys: dict[str, str] = {}
        self._names = readable_names(graph)

    def of(
        self, placement: Placement, before: Mapping[str, FakeQuantize], device: torch.device
    ) -> tuple[dict[str, FakeQuantize], dict[str, BiasShift]]:
        """The quantizers of a placement's sites, and the modules on its quantized layers' biases, by their names.

        Args:
            placement: on the graph.
            before: the quantizers that were in use; one of 16 bits that was not takes up what its twin of fewer saw.
            device: where they are to be.
        """
        found = {site.name: self._quantizer(site, before, device) for site in placement.sites}
        ranged = {site.name for site in placement.sites if self._range_width(site, found[site.name])}
        steps = {
            bias.layer: BiasSteps(found[bias.activation], found[bias.weight], bias.stretch)
            for bias in placement.biases
        }
        shifts = {}
        for layer in placement.layers:
            if layer.reason or not layer.sites or layer.operator.bias is None:
                continue
            bias = self.weight(str(layer.operator.bias.target)).detach()
            shifts[layer.name] = shift = self._bias_shift(layer.name, bias, steps.get(layer.name), device)
            if ranged.intersection(layer.sites):
                shift.widen(bias, self.weight)
        return found, shifts

    def _quantizer(
        self, site: Site, before: Mapping[str, FakeQuantize], device: torch.device
    ) -> FakeQuantize:
        """The module of a site, made when first seen.

        With some layers in float a quantizer may move to the other side of an operator that only moves codes about; it
        stays the same quantizer, since the values are the same.
        """
        key = site.key
        if key not in self.modules and not (site.is_weight or site.dynamic):
            key = next((other for other in self._moved(site) if other in self.modules), key)
        if key not in self.modules:
            key = site.key
            shape = (
                self.weight(site.name).shape if site.is_weight else site.positions[0].value.meta["val"].shape
            )
            sizes = tuple(size if isinstance(size, int) else 0 for size in shape)  # 0: the dynamic batch
            self.modules[key] = _make_quantizer(site, sizes)
        self.keys[site.name] = key
        found = self.modules[key].to(device)
        assert isinstance(found, FakeQuantize)
        if site.wide and site.name not in before:
            usual = self._moved(site.usual_width)
            twin = next((self.modules[other] for other in usual if other in self.modules), None)
            if isinstance(twin, FakeQuantize):
                found.widen(twin)
        return found

    def _bias_shift(
        self, layer: str, bias: torch.Tensor, steps: BiasSteps | None, device: torch.device
    ) -> BiasShift:
        """The module on a layer's bias; another one around the same shift where its steps have changed."""
        key = shift_key(layer)
        found = self.modules.get(key) or BiasShift(torch.zeros(len(bias)), steps)
        assert isinstance(found, BiasShift)
        if found.steps != steps:
            found = BiasShift(found.shift, steps)
        self.modules[key] = found.to(device)
        return found

    def _range_width(self, site: Site, found: FakeQuantize) -> bool:
        """Give a weight in a width on request its range, if it has none though the model is calibrated; whether so."""
        if site.usual is None or found.calibrated:
            return False
        usual = self.modules.get(site.usual_width.key)
        if not (isinstance(usual, FakeQuantize) and usual.calibrated):
            return False
        found.calibrate_weight(self.weight(site.name), MSE())
        return True

    def forget_widths(self, in_use: Iterable[FakeQuantize]) -> None:
        """Forget the quantizers of weights in widths on request but those in use."""
        used = {id(module) for module in in_use}
        for key, module in list(self.modules.items()):
            width = key.rpartition(":")[2].removesuffix(WIDTH)
            if key.endswith(WIDTH) and width.isdigit() and id(module) not in used:
                del self.modules[key]

    def _moved(self, site: Site) -> Iterator[str]:
        """The keys that the quantizer of a site may have had on this side or another one of what moves codes about."""
        yield site.key
        for node in self._same_values(site.positions[0].value):
            yield site.moved(self._names[node]).key

    def _same_values(self, value: fx.Node) -> Iterator[fx.Node]:
        """Tensors with the values of ``value`` in another order: what it is made from, then what is made of it."""
        above = value
        while (op := describe(above)) is not None and op.kind in self.target.passes and op.inputs:
            above = op.inputs[0]
            yield above
        below = [value]
        while below:
            for user in below.pop(0).users:
                op = describe(user)
                if op is not None and op.kind in self.target.passes and len(op.inputs) == 1:
                    below.append(user)
                    yield user


def shift_key(layer: str) -> str:
    """What the module on a layer's bias is called among the quantizers; no site's name ends so."""
    return f"{layer.replace('.', '/')}:bias"


def _make_quantizer(site: Site, shape: tuple[int, ...]) -> FakeQuantize:
    """The module for a site on a tensor of ``shape``."""
    if site.dynamic:
        assert isinstance(site.format, Integer)
        return RunTimeQuantize(site.name, site.format, site.granularity)
    return FakeQuantize(site.name, site.format, site.granularity, shape)
