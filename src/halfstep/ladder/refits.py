"""What repairs learned, fitted anew for other layers put back, where that measures better than doing without."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Fidelity, Reference, halves
from halfstep.graph.placement import Choices
from halfstep.journal import exact
from halfstep.ladder.checkpoints import Checkpoints
from halfstep.model import QuantizedModel
from halfstep.progress import BudgetSpent, interruptible, may_go_on, protected
from halfstep.repair.refit import refit_layers

#: A search fits anew for so many seconds; what it tries after that is tried without what repairs learned for others.
REFIT_SECONDS = 600.0


@dataclass(frozen=True)
class Refit:
    """What was fitted anew, measured.

    Attributes:
        layers: that it was fitted for, in order.
        before: the outputs' fidelity without, on examples that it was not fitted on.
        after: the same with it.
        kept: whether it was.
        whole: whether time sufficed for all of them.
    """

    layers: tuple[str, ...]
    before: Fidelity
    after: Fidelity
    kept: bool
    whole: bool = True

    def __str__(self) -> str:
        many = f"{len(self.layers)} layer{'s' * (len(self.layers) > 1)} behind those put back"
        if self.kept:
            return f"what repairs had learned was fitted anew in {many}: {self.before} to {self.after}"
        return f"what repairs had learned was dropped in {many}: {self.before} would become {self.after}"

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Refit:
        """The one whose fields are ``data``, with numbers as numbers or text."""
        return cls(
            tuple(data["layers"]), Fidelity.of(data["before"]), Fidelity.of(data["after"]), data["kept"]
        )


def refit(model: QuantizedModel) -> Refit | None:
    """Fit anew what repairs learned for layers that now read something else, and keep it where it measures better.

    It is fitted on one half of the kept examples, and measured as :func:`~halfstep.repair` does on the other. None
    where nothing is to be done, or cannot be: a site has no range, or no example was kept.

    Args:
        model: whatever its mode, which stays.
    """
    wanted = model.compensations.missing
    if not wanted or not model.sample or not all(site.calibrated for site in model.sites.values()):
        return None
    fitted, held = halves(model, model.sample)
    places = {name: place for name, place in model.compensations.find().items() if name in wanted}
    dropped = {name: place.learned() for name, place in places.items()}
    with model.using(Mode.QUANTIZE):
        reference = Reference(model, batches=held)
        before = reference.compare(model, "measuring")
        try:
            done = refit_layers(model, fitted)
            with protected():  # also of what time cut short
                after = reference.compare(model, "measuring")
        except BaseException:
            for name, place in places.items():
                place.put(dropped[name])
            raise
    kept = after.loss(reference.by) < before.loss(reference.by)
    if not kept:
        for name, place in places.items():
            place.put(dropped[name])
    model.compensations.settle(anew=places)
    return Refit(tuple(treated.name for treated in done.treated), before, after, kept, not done.cut_short)


class Refits:
    """The refits of a search, kept so that a resumed one tries the very same networks.

    Args:
        model: the search's.
        checkpoints: where they are kept.
    """

    def __init__(self, model: QuantizedModel, checkpoints: Checkpoints) -> None:
        self.model, self.checkpoints = model, checkpoints
        self.seconds = 0.0
        self._done: dict[Choices, Refit] = {}

    def __call__(self) -> None:
        """Fit anew what is to be, or take what was fitted to the very same network; :data:`REFIT_SECONDS` for all."""
        model = self.model
        wanted = {name: model.compensations.kinds(name) for name in sorted(model.compensations.missing)}
        if not wanted:
            return
        key = self.checkpoints.key_of("refit", wanted)
        if (saved := self.checkpoints.journal.load("refit", key)) is not None:
            self._done[model.choices] = Refit.of(saved.data)
            self._put(wanted, saved.tensors)
            return
        start = time.perf_counter()
        left = REFIT_SECONDS - self.seconds

        def look_at_the_clock() -> None:
            if time.perf_counter() - start > left:
                raise BudgetSpent(f"{REFIT_SECONDS:g} s")

        try:
            with interruptible(look_at_the_clock):
                may_go_on()
                done = refit(model)
        except BudgetSpent:  # if the search's own is, what comes next ends it
            return
        finally:
            self.seconds += time.perf_counter() - start
        if done is None:
            return
        self._done[model.choices] = done
        tensors = self._fitted(wanted)
        self._put(wanted, tensors)
        if done.whole:
            self.checkpoints.journal.save("refit", tensors, key, exact(asdict(done)))

    def sentence(self) -> str:
        """What was done for the layers that are put back now; empty if nothing was."""
        done = self._done.get(self.model.choices)
        return "" if done is None else f"{str(done)[:1].upper()}{str(done)[1:]}."

    def _fitted(self, layers: Iterable[str]) -> dict[str, torch.Tensor]:
        """What is in force in some layers: codes of weights, and shifts of biases."""
        tensors, places = {}, self.model.compensations.find()
        for name in layers:
            learned, site = places[name].learned(), places[name].weight
            if site is not None and learned.offset is not None:
                tensors[f"codes|{name}"] = site.codes(self.model.weight(site.name).detach())
            if learned.shift is not None:
                tensors[f"shift|{name}"] = learned.shift
        return tensors

    def _put(self, layers: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """Put in force what :meth:`_fitted` returned, to the same bits whether it was kept on the disk or not."""
        places = self.model.compensations.find()
        for name in layers:
            place = places[name]
            place.put(replace(place.learned(), offset=None, shift=tensors.get(f"shift|{name}")))
            if place.weight is not None and (codes := tensors.get(f"codes|{name}")) is not None:
                place.weight.round_to_codes(self.model.weight(place.weight.name).detach(), codes)
        self.model.compensations.settle(anew=layers)
