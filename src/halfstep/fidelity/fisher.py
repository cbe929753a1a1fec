"""What quantizing something alone would do to the outputs, for all at once, from one backward pass.

What each choice at a single site would do to the outputs, all sites and choices from one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from halfstep.evaluate import logits_of
from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.fidelity.compare import Measure, Reference, balanced, default_measure, float_tensors
from halfstep.fidelity.reference import Probe, loss_weight
from halfstep.fidelity.replay import Replay, Values, Wiring, quantizing, wiring
from halfstep.functional import fake_quantize
from halfstep.graph.inputs import ModelInputs
from halfstep.graph.operators import describe
from halfstep.model import QuantizedModel, run
from halfstep.precision import Group
from halfstep.progress import steps, track

_TOGETHER = 16  # examples whose activations are kept at a time for the backward pass

#: The choices at each site: (low, high), of the shape of its scale.
Choices = Mapping[str, Sequence[tuple[Tensor, Tensor]]]


def influences(
    model: QuantizedModel, reference: Reference, choices: Choices, by: Measure, seed: int = 0
) -> dict[str, list[float]]:
    """Estimate how much the outputs change when a single site is quantized, for each range that it could have.

    To second order in the error e(x) = Q(x) - x at a site, the divergence of the outputs is the mean over examples of
    E (g . e)^2 / 2, where g is the gradient at the site of the outputs times random weights, whose covariance is the
    Fisher information of the outputs. So a single draw an example is an unbiased estimate, for all sites and all
    choices at once, and all choices are judged on the same draws. For ``"sqnr"`` the weights are random signs, and
    E (g . e)^2 is the noise.

    Args:
        model: any mode; it runs in float here.
        reference: the examples; their first dimension is taken as the batch at every site.
        choices: what to compare; a site with a single choice costs nothing.
        by: the measure of the outputs.
        seed: of the draws.

    Returns:
        For every site with several choices the estimated loss of each, in units that compare within the site. A
        site that the outputs do not depend on differentiably is left out.

    Source: the Fisher information of Martens, "New insights and perspectives on the natural gradient method", 2020,
    section 5, used as a second-order expansion of the divergence.
    """
    open_sites = {name: model.sites[name] for name, options in choices.items() if len(options) > 1}
    parameters = {
        name: [module.format.parameters(low, high) for low, high in choices[name]]
        for name, module in open_sites.items()
    }
    losses: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    with model.using(Mode.FLOAT), steps("influence of the sites", reference.examples) as advance:
        for batch in reference.batches:
            for start in range(0, model.captured.batch_size(batch), _TOGETHER):
                part = model.captured.examples(batch, start, start + _TOGETHER)
                with torch.enable_grad(), _tapped(open_sites) as taps:
                    objective = _objective(run(model, part), by, generator, reference.compared)
                    seen = [(name, x) for name, xs in taps.items() for x in xs]
                    gradients = _gradients(objective, [x for _, x in seen])
                _add(losses, seen, gradients, open_sites, parameters)
                advance(model.captured.batch_size(part))
    return {name: total.tolist() for name, total in losses.items()}


def _add(
    losses: dict[str, Tensor],
    seen: Sequence[tuple[str, Tensor]],
    gradients: Sequence[Tensor | None],
    sites: Mapping[str, FakeQuantize],
    parameters: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
) -> None:
    """Add each site's squared change of the objective, per example, for each of its choices."""
    changes: dict[str, Tensor] = {}  # (choices, examples); a site may be passed several times
    for (name, x), gradient in zip(seen, gradients, strict=True):
        if gradient is None:
            continue
        module, x = sites[name], x.detach()
        dots = []
        for scale, zero_point in parameters[name]:
            rounded = fake_quantize(
                x, scale.to(x.device), zero_point.to(x.device), module.format, module.granularity
            )
            dots.append(rounded.sub_(x).mul_(gradient).reshape(len(x), -1).sum(1).double())
        change = torch.stack(dots)
        changes[name] = changes[name] + change if name in changes else change
    for name, change in changes.items():
        total = change.square().sum(1).cpu()
        losses[name] = losses[name] + total if name in losses else total


@contextmanager
def _tapped(sites: Mapping[str, FakeQuantize]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep what passes the sites, each time it does, as tensors that gradients can be asked of."""
    taps: dict[str, list[Tensor]] = {name: [] for name in sites}

    def keep(name: str, x: Tensor) -> Tensor:
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        taps[name].append(x)
        return x

    handles = [
        module.register_forward_hook(lambda _, __, x, name=name: keep(name, x))
        for name, module in sites.items()
    ]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _gradients(objective: Tensor, at: Sequence[Tensor], again: bool = False) -> Sequence[Tensor | None]:
    """The gradients at some values, None where there is none; ``again`` keeps what another backward pass needs."""
    if not at or not objective.requires_grad:
        return [None] * len(at)
    return torch.autograd.grad(objective, at, retain_graph=again, allow_unused=True)


@dataclass(frozen=True)
class _Tap:
    """A value of the float network that a group's quantizers change."""

    node: fx.Node
    group: int
    result: bool  # what the layer computes from quantized inputs and weight; or its output, quantized itself


def fisher(probe: Probe, groups: Sequence[Group], by: Measure, draws: int = 1, seed: int = 0) -> list[float]:
    """Estimate each group's loss of :meth:`Probe.losses` when it alone is quantized, to second order.

    A group changes the output y of its layers by dy: what they compute from quantized inputs and weights, less what
    they compute from float ones, and what quantizing the output adds. To second order the divergence of the outputs is
    E (g . dy)^2 / 2 per example, where g is the gradient at y of the outputs times random weights, drawn so that their
    covariance is the Fisher information of the outputs. For ``"sqnr"`` the weights are random signs, and E (g . dy)^2
    is the noise. Errors of a group's layers are added before squaring, so that what cancels, cancels.

    Args:
        probe: its kept examples are used.
        groups: to be scored.
        by: the loss that is estimated.
        draws: of the weights, one backward pass each; the estimate is unbiased with one, and its spread falls with
            more.
        seed: of the draws.

    Source: Martens, "New insights and perspectives on the natural gradient method" (2020), section 5, the Fisher
    information as the second-order expansion of the divergence.
    """
    wires = wiring(probe.model, tied=True)
    taps = _taps(probe, groups, wires)
    totals = torch.zeros(len(groups), dtype=torch.float64)
    weight = 0.0
    generator = torch.Generator().manual_seed(seed)
    nodes = {tap.node for tap in taps}
    for inputs in track(probe.batches, "Fisher information of the layers"):
        values, kept = _run_tapped(probe.replay, inputs, nodes)
        outputs = probe.replay.outputs(values)
        scale = balanced(probe.model.captured, [outputs])
        with quantizing([wires]):
            errors = [_error(probe, tap, values, wires) for tap in taps]
        for draw in range(draws):
            with torch.enable_grad():
                gradients = _gradients(
                    _objective(outputs, by, generator, scale), list(kept.values()), draw < draws - 1
                )
            by_node = dict(zip(kept, gradients, strict=True))
            size = probe.model.captured.batch_size(inputs)
            changes = torch.zeros(len(groups), size, dtype=torch.float64)
            for tap, error in zip(taps, errors, strict=True):
                if (gradient := by_node[tap.node]) is not None:
                    axis = probe.model.captured.batch_axis(tap.node) or 0
                    changes[tap.group] += _per_example(gradient * error, size, axis)
            totals += changes.square().sum(1) / draws
        weight += loss_weight(outputs, by, scale) * (2 if by == "kl" else 1)
        # Forward, layers quantized, and a backward is two.
        probe.passes += probe.model.captured.batch_size(inputs) * (2 + 2 * draws)
    return (totals / weight).tolist()


def curvatures(
    model: QuantizedModel,
    batches: Sequence[ModelInputs],
    nodes: Collection[fx.Node],
    by: Measure | None = None,
    draws: int = 1,
    seed: int = 0,
) -> list[dict[fx.Node, Tensor]]:
    """Estimate how much the outputs feel an error in each element of some values of the float network.

    That is the diagonal of the Fisher information at the value, example by example: the mean of g^2, where g is the
    gradient of the same objective as :func:`fisher`'s.

    Args:
        model: any mode.
        batches: model inputs, where the model is.
        nodes: whose values.
        by: the loss that is estimated; None for the :func:`.default_measure` of the outputs.
        draws: of the objective, one backward pass each.
        seed: of the draws.

    Returns:
        For each batch, by node: of the value's shape, in bfloat16, for it is an estimate with a spread of its own
        size. A value that the outputs do not depend on differentiably is left out.
    """
    replay, generator = Replay(model), torch.Generator().manual_seed(seed)
    found = []
    for inputs in track(batches, "Fisher information of the blocks"):
        values, kept = _run_tapped(replay, inputs, set(nodes))
        outputs = replay.outputs(values)
        scale = balanced(model.captured, [outputs])
        by = by or default_measure(float_tensors(outputs), bool(model.captured.parts))
        squares: dict[fx.Node, Tensor] = {}
        for draw in range(draws):
            with torch.enable_grad():
                gradients = _gradients(
                    _objective(outputs, by, generator, scale), list(kept.values()), draw < draws - 1
                )
            for node, gradient in zip(kept, gradients, strict=True):
                if gradient is not None:
                    square = gradient.square() / draws
                    squares[node] = squares[node] + square if node in squares else square
        found.append({node: square.bfloat16() for node, square in squares.items()})
    return found


def _run_tapped(
    replay: Replay, inputs: ModelInputs, nodes: Collection[fx.Node]
) -> tuple[Values, dict[fx.Node, Tensor]]:
    """The float network's values, and those of some nodes as tensors that gradients can be asked of."""
    kept: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node, value: Any) -> Any:
        if node not in nodes:
            return value
        # A value of its own, which gradients can be asked of even where no parameter wants one.
        kept[node] = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        return kept[node]

    with torch.enable_grad():
        return replay.run(inputs, tap=keep), kept


def _per_example(products: Tensor, batch: int, axis: int) -> Tensor:
    """The sum for each example, (batch,); what has no batch (a table of positions, say) is shared out equally."""
    if products.dim() and products.shape[axis] == batch:
        return products.movedim(axis, 0).reshape(batch, -1).sum(1).double().cpu()
    return (products.double().sum().cpu() / batch).expand(batch)


def _taps(probe: Probe, groups: Sequence[Group], wires: Wiring) -> list[_Tap]:
    """Where the groups' errors enter: their layers' results, and those of their outputs that are quantized."""
    owner = {name: index for index, group in enumerate(groups) for name in group.layers}
    quantized = {value for value, _ in wires}
    target = probe.model.target
    taps = []
    for layer in probe.model.layers:
        if layer.name not in owner:
            continue
        node = layer.operator.node
        taps.append(_Tap(node, owner[layer.name], result=True))
        while (
            len(node.users) == 1 and (op := describe(next(iter(node.users)))) and op.kind in target.absorbed
        ):
            node = op.node
        kernel = target.layers.get(layer.operator.kind)
        if node in quantized and kernel is not None and kernel.output:
            taps.append(_Tap(node, owner[layer.name], result=False))
    return taps


def _error(probe: Probe, tap: _Tap, values: Values, wires: Wiring) -> Tensor:
    """What quantization adds to the tapped value, with everything before it in float."""
    value: Tensor = values[tap.node].detach()
    if tap.result:
        seen = {
            node: values[node].detach() if isinstance(values[node], Tensor) else values[node]
            for node in tap.node.all_input_nodes
        }
        result: Tensor = probe.replay.compute(tap.node, seen, wires)
        return result - value
    quantizer = next(module for (source, _), module in wires.items() if source is tap.node)
    quantized: Tensor = quantizer(value)
    return quantized - value


def _objective(
    outputs: Any, by: Measure, generator: torch.Generator, scale: Callable[[Any], list[Tensor]]
) -> Tensor:
    """The scalar whose gradient is taken: the outputs times random weights, whose covariance is the loss's curvature.

    Of the squared error that is the identity: random signs e. Of the divergence it is diag(p) - p p^T, and the weights
    are s (e - s (s . e)) with s = sqrt(p), which touch every class, however rare.
    """
    total = torch.zeros((), dtype=torch.float64)
    for output in [logits_of(outputs)] if by == "kl" else float_tensors(scale(outputs)):
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2.0 - 1
        if by == "kl":
            root = output.detach().softmax(-1).sqrt()
            signs = root * (signs - root * (root * signs).sum(-1, keepdim=True))
        total = total + (output.double() * signs).sum().cpu()
    return total
