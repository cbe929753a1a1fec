"""Cross-layer equalization: classes of channels are scaled, writers against readers.

Scaling a class of channels: factors move from the weights that write it to those that read it.

Cross-layer equalization: weights that write a channel and weights that read it get the same range.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from halfstep.graph.capture import TOLERANCE, relative_error
from halfstep.graph.inputs import ModelInputs, move
from halfstep.model import QuantizedModel
from halfstep.progress import may_go_on
from halfstep.repair.channels import Channels, Port, find_channels
from halfstep.repair.ranges import calibrate_again, observe_sites, sample_of
from halfstep.repair.record import Repair, Treated
from halfstep.snapshot import undone_on_error

#: Factors are kept within 2^-20 to 2^20, so that no weight leaves the normal floats.
LIMIT = 2.0**20

#: Factors up to this, and down to its inverse, count as none: a quarter of a step at the end of an 8-bit range.
SETTLED = 1.001


def rows_of(weight: Tensor, port: Port, size: int) -> Tensor:
    """The entries of ``weight`` that meet each of a class's channels, as (size, entries).

    >>> rows_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), Port("fc", "fc.weight", None, axis=1), 2)
    tensor([[1., 3.],
            [2., 4.]])
    """
    if port.groups > 1:  # (groups * out, in, ...) -> (groups * in, out, ...)
        weight = weight.unflatten(0, (port.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.reshape(size, -1)
    entries = weight.narrow(port.axis, port.start, size * port.repeat)
    return entries.movedim(port.axis, 0).reshape(size, -1)


@torch.no_grad()
def scale_port(weight: Tensor, port: Port, factors: Tensor) -> None:
    """Multiply in place what meets channel c by ``factors[c]``."""
    factors = factors.repeat_interleave(port.repeat).to(weight)
    if port.groups > 1:
        parts = weight.unflatten(0, (port.groups, -1))  # (groups, out, in, ...), a view
        parts.mul_(factors.view(port.groups, 1, -1, *[1] * (weight.dim() - 2)))
    else:
        entries = weight.narrow(port.axis, port.start, len(factors))
        entries.mul_(factors.view(-1, *[1] * (weight.dim() - 1 - port.axis)))


@torch.no_grad()
def scale(model: QuantizedModel, channels: Channels, factors: Tensor) -> None:
    """Divide what writes the channels by ``factors`` and multiply what reads them; biases and their shifts follow."""
    shifts = model.shifts
    for port in channels.writers:
        scale_port(model.weight(port.weight).data, port, 1 / factors)
        if port.bias is not None:
            scale_port(model.weight(port.bias).data, replace(port, axis=0), 1 / factors)
        if port.name in shifts:
            scale_port(shifts[port.name].shift, replace(port, axis=0), 1 / factors)
    for port in channels.readers:
        scale_port(model.weight(port.weight).data, port, factors)


#: Gives the factors of a class of channels, and what is minimised, before and after.
Choose = Callable[[Channels], tuple[Tensor, float, float]]


def scaled(
    model: QuantizedModel,
    name: str,
    measure: str,
    classes: Sequence[Channels],
    choose: Choose,
    batches: Sequence[ModelInputs],
    sweeps: int = 1,
) -> Repair:
    """Scale every class that can be, check that the float function is the same, and calibrate what was scaled.

    Sites get the ranges that their own calibrators answer on what they see now. Whether other calibrators would do
    better there is for the caller to find out: the record names the sites.

    Where the float outputs on the example inputs change by more than the capture's tolerance, everything is put back,
    and the record says so. An error leaves the model as it was, too.
    """
    start = time.perf_counter()
    usable = [channels for channels in classes if channels.scalable]
    skipped = tuple((str(c) if c.readers else c.writers[0].name, c.barrier) for c in classes if c.barrier)
    with undone_on_error(model) as before:
        reference = _outputs(model)
        treated, changed, notes = _scale_all(model, usable, choose, sweeps)
        error = max(
            (relative_error(got, wanted) for got, wanted in zip(_outputs(model), reference, strict=True)),
            default=0.0,
        )
        if error > TOLERANCE:
            before.restore()
            why = f"put back: it changed the float outputs by {error:.1e} (relative), allowed {TOLERANCE:.0e}"
            return Repair(name, measure, (), skipped, (why,), time.perf_counter() - start)
        moved = _calibrate(model, changed, batches)
    # Digits would be another processor's, and a run may go on there.
    power = 10.0 ** max(math.ceil(math.log10(error)), -6) if error else 0.0
    notes = [f"the float outputs changed by {power:.0e} at most (relative)", *notes]
    return Repair(name, measure, treated, skipped, tuple(notes), time.perf_counter() - start, moved)


def _scale_all(
    model: QuantizedModel, classes: Sequence[Channels], choose: Choose, sweeps: int
) -> tuple[tuple[Treated, ...], list[Channels], list[str]]:
    """Scale every class in turn, until a sweep over all changes next to nothing.

    Returns:
        What was done of each class, the classes that were changed, and a note where the sweeps did not suffice.
    """
    treated: dict[str, Treated] = {}
    changed: dict[int, Channels] = {}
    for _ in range(sweeps):
        largest = 1.0
        for channels in classes:
            may_go_on()
            clock = time.perf_counter()
            factors, was, now = choose(channels)
            factors = factors.clamp(1 / LIMIT, LIMIT)
            most = max(float(factors.max()), float(1 / factors.min()))
            if most > SETTLED or id(channels) in changed:
                scale(model, channels, factors)
                changed[id(channels)] = channels
            first = treated.get(str(channels))
            treated[str(channels)] = Treated(
                str(channels),
                first.before if first else was,
                now,
                (first.seconds if first else 0.0) + time.perf_counter() - clock,
            )
            largest = max(largest, most)
        if largest <= SETTLED:
            break
    notes = list[str]()
    if sweeps > 1 and largest > SETTLED:
        notes.append(f"not settled after {sweeps} sweeps: the last one still scaled by up to {largest:.3g}")
    return tuple(treated.values()), list(changed.values()), notes


def _calibrate(
    model: QuantizedModel, classes: Sequence[Channels], batches: Sequence[ModelInputs]
) -> tuple[str, ...]:
    """Observe and calibrate again the sites whose values were scaled; their names."""
    values = {value for channels in classes for value in channels.values}
    names = {port.weight for c in classes for port in (*c.writers, *c.readers)}
    touched = [
        site
        for site in model.placement.sites
        if (site.name in names if site.is_weight else any(p.value in values for p in site.positions))
    ]
    observe_sites(model, [site.name for site in touched if not site.is_weight], batches)
    calibrate_again(model, touched)
    return tuple(site.name for site in touched)


def _outputs(model: QuantizedModel) -> list[Tensor]:
    """The float network's outputs on the example inputs."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = move(model.captured.example_inputs, device)
    with torch.no_grad():
        outputs = model.captured(*args, **kwargs)
    return [
        leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


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
            bias = model.weight(port.bias).detach().narrow(0, port.start, size)
            reach = torch.maximum(reach, bias.double().abs().cpu())
    return reach
