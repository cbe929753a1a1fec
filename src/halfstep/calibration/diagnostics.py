"""Reasons for a second look at a site: what the statistics say against the ranges taken from them."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.batches import abreast
from halfstep.calibrators import (
    Calibrator,
    Concern,
    data_concerns,
    disagreements,
    lost,
    range_of,
    unlike,
    unsteady,
)
from halfstep.errors import named
from halfstep.fake_quantize import Mode
from halfstep.graph.inputs import ModelInputs, call_arguments
from halfstep.graph.placement import FloatOperator, Layer
from halfstep.graph.tails import TAIL
from halfstep.model import QuantizedModel, run
from halfstep.progress import track
from halfstep.ranges import activation_sites
from halfstep.statistics import Histogram

#: So many examples of the evaluation's data are looked at: enough to see that they are of another kind, and no more
#: than calibration usually has, so that this costs no more.
LOOKED_AT = 512

#: They are taken at so many places of the data: more and smaller pieces would take longer to run.
PLACES = 8


_NAMED = 3  # sites that a sentence names


@dataclass(frozen=True)
class SiteConcern:
    """A reason for a second look, with the site's name.

    Attributes:
        site: where.
        concern: what was found and what to do.
    """

    site: str
    concern: Concern

    def __str__(self) -> str:
        return f"site {self.site!r}: {self.concern}"


class Seen:
    """What passed the activations' sites: of a bounded number of examples, spread evenly over data of known number.

    Args:
        model: whose sites.
        total: how many examples there are; 0 where that is not known, and the first ones are counted.
        examples: how many are counted at most.

    Attributes:
        histograms: by site.
        counted: examples so far.
    """

    def __init__(self, model: QuantizedModel, total: int = 0, examples: int = LOOKED_AT) -> None:
        self.histograms = {name: Histogram() for name in activation_sites(model)}
        self.counted = self._passed = 0
        self._total, self._examples = total, examples
        self._at: Counter[str] = Counter()

    def take(self, size: int) -> int:
        """How many examples of the next batch, of ``size``, are to be counted: its first ones."""
        self._passed += size
        share = min(1.0, self._examples / self._total) if self._total else 1.0
        place = max(1, self._examples // PLACES)
        reached = math.ceil(self._passed * share / place) * place
        count = min(size, min(self._examples, reached) - self.counted)
        self.counted += count
        return count

    def take_at(self, site: str, size: int) -> int:
        """The same for a site of a module that is called by itself, as often as its caller wants."""
        count = min(self._examples - self._at[site], size)
        self._at[site] += count
        self.counted = max(self.counted, self._at[site])
        return count

    @property
    def full(self) -> bool:
        """Whether no further example is counted."""
        return self.counted >= self._examples

    def __str__(self) -> str:
        of = f" of {self._total:,}" if self._total > self.counted else ""
        return f"{self.counted:,}{of} examples of the evaluation were looked at"


def concerns(
    model: QuantizedModel,
    calibrators: Sequence[Calibrator] = (),
    evaluation: Iterable[ModelInputs] | None = None,
) -> tuple[SiteConcern, ...]:
    """What the statistics of each activation say against trusting ranges that are taken from them.

    A site that was never reached or saw only zeros, values that are not finite, a percentile of too few values or of
    a site that is mostly zero, calibrators more than twofold apart, values distributed unlike those of other data, and
    inputs of a concat that the codes of the whole leave few bits.

    Args:
        model: observed.
        calibrators: those that shall be used; two or more are compared.
        evaluation: inputs like those the model will see; the first :data:`LOOKED_AT` examples are run here. None
            compares with nothing.

    Returns:
        In the graph's order, concats last; empty if all is well.

    Raises:
        DataError: an evaluation batch has a wrong shape or type.
    """
    sites = activation_sites(model)
    seen = Seen(model)
    if evaluation is not None:
        look(model, evaluation, seen)
    found = []
    for name, module in sites.items():
        histogram = module.histogram
        at_site = data_concerns(histogram, calibrators)
        if histogram.count:
            if len(calibrators) > 1:
                at_site += disagreements({c: range_of(c, histogram, module.format) for c in calibrators})
            at_site += _unlike(name, histogram, seen)
        found += [SiteConcern(name, concern) for concern in at_site]
    return (*found, *lost_parts(model))


def unlike_sites(model: QuantizedModel, seen: Seen) -> tuple[SiteConcern, ...]:
    """The activations whose values in ``seen`` are distributed unlike those that were calibrated on."""
    return tuple(
        SiteConcern(name, concern)
        for name, module in activation_sites(model).items()
        for concern in _unlike(name, module.histogram, seen)
    )


def watching(model: QuantizedModel, seen: Seen) -> AbstractContextManager[None]:
    """Count what passes the activations' sites in the block, apart from the statistics for calibration.

    Args:
        model: any mode.
        seen: filled as the model runs.
    """
    return _counting(model, seen, seen.take)


def look(model: QuantizedModel, batches: Iterable[ModelInputs], seen: Seen) -> Seen:
    """Run the float model on those examples that ``seen`` counts, and on no others; ``seen`` filled.

    Raises:
        DataError: a batch has a wrong shape or type.
    """

    def examples() -> Iterator[ModelInputs]:
        for index, inputs in enumerate(track(batches, "looking at evaluation data")):
            with named(f"evaluation batch {index}"):
                if count := seen.take(model.captured.batch_size(inputs)):
                    part = model.captured.examples(inputs, 0, count)
                    model.flatten(*call_arguments(part))
                    yield part
            if seen.full:
                break

    with _counting(model, seen, lambda size: size), model.using(Mode.FLOAT), torch.no_grad():
        for _ in abreast(model, lambda _, part: run(model, part), examples()):
            pass
    return seen


@contextmanager
def _counting(model: QuantizedModel, seen: Seen, take: Callable[[int], int]) -> Iterator[None]:
    """Count the first examples of every batch that runs in the block, as many as ``take`` says of its size."""
    here = threading.local()  # several batches may run at once
    axes = {site.name: model.captured.batch_axis(site.positions[0].value) for site in model.placement.sites}

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here.size = model.captured.batch_size(kwargs or args)
        here.count = take(here.size)

    def look_at(name: str, x: Tensor) -> None:
        if not hasattr(here, "count"):  # one of several modules is called, not the whole
            along = axes[name] or 0
            if x.dim() and (count := seen.take_at(name, x.shape[along])):
                seen.histograms[name].update(x.narrow(along, 0, count))
        elif here.count and (axis := axes[name]):  # the batch is not first
            seen.histograms[name].update(x.narrow(axis, 0, here.count))
        elif here.count:
            by_example = x.dim() > 0 and len(x) % here.size == 0  # also (batch * heads, ...)
            seen.histograms[name].update(x[: len(x) // here.size * here.count] if by_example else x)

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [
        module.register_forward_pre_hook(lambda _, args, name=name: look_at(name, args[0]))
        for name, module in activation_sites(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unlike(name: str, calibrated: Histogram, seen: Seen) -> list[Concern]:
    """What is to be said of a site where other values were seen, and what that rests on."""
    now = seen.histograms.get(name)
    if now is None or not (now.count and calibrated.count):
        return []
    return [replace(concern, message=f"{concern.message}; {seen}") for concern in unlike(calibrated, now)]


#: Which batch the thread observes, from 0.
BATCH: ContextVar[int] = ContextVar("batch")


class _ByTurns(Histogram):
    """Hands the batches that are observed to two histograms by turns, in the order of the data."""

    def __init__(self, *halves: Histogram) -> None:
        super().__init__()
        self._halves = halves

    @property
    def parts(self) -> tuple[Histogram, ...]:
        return self._halves

    def update(self, x: Tensor) -> int:
        return self._halves[BATCH.get() % 2].update(x)


@contextmanager
def halving(model: QuantizedModel) -> Iterator[list[SiteConcern]]:
    """Let the batches that are observed in the block fill two histograms a site by turns, and compare their ranges.

    Args:
        model: its sites hold the sum of both halves afterwards, which is what one histogram would hold.

    Yields:
        A concern for each activation whose range differs between the halves; filled when the block ends.
    """
    found: list[SiteConcern] = []
    sites = activation_sites(model)
    halves = [(module.histogram, Histogram()) for module in sites.values()]
    for module, pair in zip(sites.values(), halves, strict=True):
        module.histogram = _ByTurns(*pair)
    try:
        yield found
    finally:
        for (name, module), (first, second) in zip(sites.items(), halves, strict=True):
            if first.count and second.count:
                found += [SiteConcern(name, concern) for concern in unsteady(first, second, module.format)]
            first.merge(second)
            module.histogram = first


def sentences(found: Sequence[SiteConcern]) -> list[str]:
    """A sentence for every kind of concern: how many sites it is, the first few by name, and the first's message."""
    kinds: dict[str, list[SiteConcern]] = {}
    for concern in found:
        kinds.setdefault(concern.concern.kind, []).append(concern)
    lines = []
    for some in kinds.values():
        others = [repr(concern.site) for concern in some[1:]]
        more = ", ".join(others[: _NAMED - 1]) + (
            f" and {len(others) - _NAMED + 1} more" if len(others) >= _NAMED else ""
        )
        lines.append(str(some[0]) + (f" (so too {more})" if others else ""))
    return lines


def tails(model: QuantizedModel) -> list[str]:
    """What is left in float behind the last layers, and why: a sentence for every reason, by name."""
    found: dict[str, list[str]] = {}
    everything: list[Layer | FloatOperator] = [*model.placement.layers, *model.placement.float_operators]
    for each in everything:
        if reason := each.operator.node.meta.get(TAIL):
            found.setdefault(reason, []).append(each.name)
    return [f"{', '.join(names)}: {reason}" for reason, names in found.items()]


def lost_parts(model: QuantizedModel) -> tuple[SiteConcern, ...]:
    """The inputs of concats whose values are hardly told apart in the codes of what they are joined to.

    To leave the concat alone in float would not help: a layer that reads it whole takes codes of one scale on every
    target. So the layers that lose by it are named, and the ladder decides by the metric whether they go to float.

    Args:
        model: observed.
    """
    placement, sites = model.placement, activation_sites(model)
    names = {
        site.positions[0].value: site.name
        for site in placement.sites
        if site.name in sites and not site.dynamic and sites[site.name].histogram.count
    }
    found = []
    for follower in placement.followers:
        joined = follower.operator
        if joined.kind != "concat" or joined.node not in names:
            continue
        whole = sites[names[joined.node]]
        readers = [layer.name for layer in placement.layers if names[joined.node] in layer.sites]
        by = f"; what reads them in one scale is {', '.join(map(repr, readers))}: in float it would lose nothing"
        for value in joined.inputs:
            if value in names:
                part = names[value]
                for concern in lost(sites[part].histogram, whole.histogram, whole.format):
                    message = f"its part {part!r}, {concern.message}{by if readers else ''}"
                    found.append(SiteConcern(names[joined.node], replace(concern, message=message)))
    return tuple(found)
