"""Reasons for a second look at a site: what the statistics say against the ranges taken from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.calibrators import Calibrator, Concern, data_concerns, disagreements, unlike, unsteady
from halfstep.errors import named
from halfstep.evaluate import Scorer, labelled_data
from halfstep.fake_quantize import Mode
from halfstep.graph.inputs import ModelInputs, batch_size
from halfstep.ladder.ranges import activation_sites
from halfstep.model import QuantizedModel, run
from halfstep.progress import track
from halfstep.statistics import Histogram

#: So many examples of the evaluation's data are looked at: enough to see that they are of another kind.
LOOKED_AT = 2048
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


def concerns(
    model: QuantizedModel,
    calibrators: Sequence[Calibrator] = (),
    evaluation: Iterable[ModelInputs] | None = None,
) -> tuple[SiteConcern, ...]:
    """What the statistics of each activation say against trusting ranges that are taken from them.

    A site that was never reached or saw only zeros, values that are not finite, a percentile of too few values or of
    a site that is mostly zero, calibrators more than twofold apart, and values distributed unlike those of other data.

    Args:
        model: observed.
        calibrators: those that shall be used; two or more are compared.
        evaluation: inputs like those the model will see, run once here; None compares with nothing.

    Returns:
        In the graph's order; empty if all is well.

    Raises:
        DataError: an evaluation batch has a wrong shape or type.
    """
    sites = activation_sites(model)
    seen = {} if evaluation is None else _observed(model, evaluation)
    found = []
    for name, module in sites.items():
        histogram = module.histogram
        at_site = data_concerns(histogram, calibrators)
        if histogram.count:
            if len(calibrators) > 1:
                at_site += disagreements({c: c.range(histogram, module.format) for c in calibrators})
            if name in seen and seen[name].count:
                at_site += unlike(histogram, seen[name])
        found += [SiteConcern(name, concern) for concern in at_site]
    return tuple(found)


def unlike_sites(model: QuantizedModel, seen: Mapping[str, Histogram]) -> tuple[SiteConcern, ...]:
    """The activations whose values in ``seen`` are distributed unlike those that were calibrated on."""
    return tuple(
        SiteConcern(name, concern)
        for name, module in activation_sites(model).items()
        if module.histogram.count and name in seen and seen[name].count
        for concern in unlike(module.histogram, seen[name])
    )


@contextmanager
def watching(model: QuantizedModel, examples: int = LOOKED_AT) -> Iterator[dict[str, Histogram]]:
    """Count what passes the activations' sites in the block, apart from the statistics for calibration.

    Args:
        model: any mode.
        examples: the count ends with the batch that reaches this number.

    Yields:
        The histograms by site, filled as the model runs.
    """
    sites = activation_sites(model)
    seen = {name: Histogram() for name in sites}
    passed, counting = 0, False

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal passed, counting
        counting = passed < examples
        passed += batch_size(kwargs or args)

    def count(name: str, x: Tensor) -> None:
        if counting:
            seen[name].update(x)

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [
        module.register_forward_pre_hook(lambda _, args, name=name: count(name, args[0]))
        for name, module in sites.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def look(model: QuantizedModel, scorer: Scorer, examples: int = LOOKED_AT) -> dict[str, Histogram]:
    """What the float model sees of the labelled data, up to a number of examples; empty where they cannot be seen."""
    passed = 0
    with watching(model, examples) as seen, model.using(Mode.FLOAT), torch.no_grad():
        for batches in labelled_data(scorer):
            for inputs, _ in batches:
                run(model, inputs)
                passed += batch_size(inputs)
                if passed >= examples:
                    return seen
    return seen


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
    turn = 1

    def swap(*_: Any) -> None:
        nonlocal turn
        turn = 1 - turn
        for module, pair in zip(sites.values(), halves, strict=True):
            module.histogram = pair[turn]

    handle = model.register_forward_pre_hook(swap)
    try:
        yield found
    finally:
        handle.remove()
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


def _observed(model: QuantizedModel, batches: Iterable[ModelInputs]) -> dict[str, Histogram]:
    with watching(model) as seen, model.using(Mode.FLOAT), torch.no_grad():
        for index, batch in enumerate(track(batches, "observing evaluation data")):
            with named(f"evaluation batch {index}"):
                run(model, batch)
    return seen
