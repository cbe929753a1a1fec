"""What each choice at a single site would do to the outputs, all sites and choices from one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from halfstep.evaluate import logits_of
from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.functional import fake_quantize
from halfstep.ladder.fidelity import Measure, Reference
from halfstep.model import QuantizedModel, run
from halfstep.progress import steps
from halfstep.runtime.parity import float_tensors

_TOGETHER = 16  # examples whose activations are kept at a time for the backward pass

#: The choices at each site: (low, high), of the shape of its scale.
Choices = Mapping[str, Sequence[tuple[Tensor, Tensor]]]


def influences(
    model: QuantizedModel, reference: Reference, choices: Choices, by: Measure, seed: int = 0
) -> dict[str, list[float]]:
    """Estimate how much the outputs change when a single site is quantized, for each range that it could have.

    To second order in the error e(x) = Q(x) - x at a site, the divergence of the outputs is the mean over examples of
    E (g . e)^2 / 2, where g is the gradient of log p(y) at the site and y is drawn from the network's own answer p.
    So a single gradient of one drawn y an example is an unbiased estimate, for all sites and all choices at
    once, and all choices are judged on the same draws. For ``"sqnr"`` g is the gradient of the outputs times
    random signs, and E (g . e)^2 the noise.

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
                    objective = _objective(run(model, part), by, generator)
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


def _objective(outputs: object, by: Measure, generator: torch.Generator) -> Tensor:
    """The scalar whose gradient is taken: log p(y) for drawn y, or the outputs times random signs, summed."""
    if by == "kl":
        logs = logits_of(outputs).double().log_softmax(-1).flatten(0, -2)  # (decisions, classes)
        drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)
        return logs.gather(1, drawn.to(logs.device)).sum()
    total = torch.zeros((), dtype=torch.float64)
    for output in float_tensors(outputs):
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        total = total + (output.double() * signs).sum().cpu()
    return total


def _gradients(objective: Tensor, at: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not at or not objective.requires_grad:
        return [None] * len(at)
    return torch.autograd.grad(objective, at, allow_unused=True)
