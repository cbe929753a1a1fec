"""Repairs in order, each kept only where it measures better, and fitted anew for other layers in float.

What repairs learned, fitted anew for other layers put back, where that measures better than doing without.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from halfstep.calibration.calibrate import calibrate_moved
from halfstep.calibration.candidates import BestOf
from halfstep.errors import ArgumentError
from halfstep.evaluate import as_scorer
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Fidelity, Measure, Reference, halves
from halfstep.fidelity.reference import knowing_float
from halfstep.graph.inputs import ModelInputs
from halfstep.graph.layer_precision import LayerPrecision
from halfstep.journal import exact
from halfstep.ladder.checkpoints import Checkpoints
from halfstep.model import QuantizedModel
from halfstep.progress import BudgetSpent, interruptible, may_go_on, protected, track
from halfstep.ranges import activation_sites
from halfstep.repair.bias import correct_bias
from halfstep.repair.equalize import equalize
from halfstep.repair.ranges import sample_of, weigh_ranges
from halfstep.repair.reconstruct import reconstruct
from halfstep.repair.record import Repair, Treated
from halfstep.repair.refit import refit_layers
from halfstep.repair.rounding import gptq, learn_rounding
from halfstep.repair.smooth_quant import migrate
from halfstep.snapshot import Snapshot

#: A repair: takes a calibrated model and batches, changes the model, and says what it did.
Pass = Callable[[QuantizedModel, Sequence[ModelInputs]], Repair]

#: Function-preserving scalings first, then the ranges of what they left, then roundings on those ranges, and the mean
#: errors that remain last.
PASSES: tuple[Pass, ...] = (equalize, migrate, weigh_ranges, gptq, learn_rounding, correct_bias)

#: What takes minutes where those take seconds: tried on what they left, where that is not enough.
THOROUGH: tuple[Pass, ...] = (reconstruct,)


@dataclass(frozen=True)
class Trial:
    """One repair, measured.

    Attributes:
        repair: what it did.
        before: the outputs' fidelity on examples that it was not fitted on.
        after: the same with the repair.
        kept: whether it was.
    """

    repair: Repair
    before: Fidelity
    after: Fidelity
    kept: bool

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Trial:
        """The one whose fields are ``data``, with numbers as numbers or text."""
        done = data["repair"]
        figures = [[float(each[name]) for name in ("before", "after", "seconds")] for each in done["treated"]]
        treated = [Treated(each["name"], *some) for each, some in zip(done["treated"], figures, strict=True)]
        skipped = tuple((name, why) for name, why in done["skipped"])
        words = done["name"], done["measure"], tuple(treated), skipped, tuple(done["notes"])
        before, after = Fidelity.of(data["before"]), Fidelity.of(data["after"])
        repair = Repair(*words, float(done["seconds"]), tuple(done.get("moved", ())))
        return cls(repair, before, after, data["kept"])

    def __str__(self) -> str:
        what, count = self.repair.name, len(self.repair.treated)
        if not count:
            reasons = [*(why for _, why in self.repair.skipped), *self.repair.notes]
            return f"{what} found nothing to do" + (f": {reasons[0]}" if reasons else "")
        if self.kept:
            return f"{what} on {count}: {self.before} to {self.after}, kept"
        return f"{what} put back: {self.before} would become {self.after}"


#: Runs a trial, or gives the model what the same trial left it with before.
Keeper = Callable[[Pass, Callable[[], Trial]], Trial]


@dataclass(frozen=True)
class Repairs:
    """What :func:`repair` tried.

    Attributes:
        trials: in order.
        by: the measure that decided.
        fitted: examples that the repairs worked on.
        examples: other examples that they were measured on.
        seconds: of wall time, for everything.
        left_out: repairs that the budget left no time to begin or to finish.
        score_before: the metric before; None without one.
        score_after: the metric with all that was kept.
        put_back: the metric fell, and everything was put back.
    """

    trials: tuple[Trial, ...]
    by: Measure
    fitted: int
    examples: int
    seconds: float
    left_out: tuple[str, ...] = ()
    score_before: float | None = None
    score_after: float | None = None
    put_back: bool = False

    @property
    def kept(self) -> tuple[str, ...]:
        """The repairs that are in the model now."""
        return () if self.put_back else tuple(trial.repair.name for trial in self.trials if trial.kept)

    def sentences(self) -> list[str]:
        """What each repair brought, or why it was put back; the same in every run, so without the seconds."""
        lines = [str(trial) for trial in self.trials]
        lines += [note for trial in self.trials if trial.kept for note in trial.repair.notes]
        lines += [f"{name} was left out: the budget is used up" for name in self.left_out]
        if self.score_before is not None and self.score_after is not None:
            verdict = "everything was put back" if self.put_back else "kept"
            lines.append(f"all together: metric {self.score_before:.4f} to {self.score_after:.4f}, {verdict}")
        return lines

    def __str__(self) -> str:
        head = (
            f"repairs fitted on {self.fitted} and measured on {self.examples} examples, {self.seconds:.1f} s"
        )
        took = [f"{trial.repair.name} {trial.repair.seconds:.1f} s" for trial in self.trials]
        return "\n".join([head, *(f"- {sentence}" for sentence in self.sentences()), f"- {', '.join(took)}"])


def repair(
    model: QuantizedModel,
    passes: Sequence[Pass] = PASSES,
    batches: Iterable[ModelInputs] | None = None,
    metric: Any = None,
    budget: float | None = None,
    keeper: Keeper | None = None,
    calibrators: BestOf | None = None,
    further: Sequence[ModelInputs] = (),
) -> Repairs:
    """Repair a calibrated network for few bits before any training, keeping only what measures better.

    Each repair works on half of the examples. It stays if the outputs of the quantized network come nearer to those of
    the float network on the other half, by the divergence of the classes' probabilities, or by the signal to noise
    where the outputs are no classes. The float network computes what it did before.

    What scales channels changes the distributions that calibrators were chosen for. So they are chosen again then, on
    what all examples now show and by the outputs of the half that repairs work on, before the repair is judged.

    Args:
        model: calibrated; left with what was kept, quantizing.
        passes: what to try, in order.
        batches: model inputs; all that :func:`~halfstep.observe` kept if None, without ``further`` if that is given.
        metric: has the last word: where it falls, everything is put back. None for none.
        budget: seconds after which repairs end, within a layer's time: what was done of one by then is measured and
            kept or put back like the others; None for no bound.
        keeper: knows what repairs brought in a run that was interrupted; None for nothing.
        calibrators: what to choose among where distributions have changed; all of :func:`best_of` if None. The
            measure alone decides.
        further: model inputs that repairs work on beside their half of the examples.

    Raises:
        DataError: if there are no examples.
        NotObservedError: naming a site that has no range.
        ArgumentError: a budget that is not above 0.
    """
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise ArgumentError(f"budget: got {budget}, needed seconds above 0, or None for no bound")
    start = time.perf_counter()
    examples = sample_of(model, batches, many=not further)
    fitted, held = halves(model, examples)
    learned = [*fitted, *further]
    model.set_mode(Mode.QUANTIZE)
    reference = Reference(model, sum(map(model.captured.batch_size, held)), held)
    by = reference.by
    calibrators = replace(calibrators or BestOf(), by=by)
    untouched = Snapshot.of(model)
    scorer = None if metric is None else knowing_float(as_scorer(metric), model)
    score_before = None if scorer is None else scorer.evaluate(model)
    trials: list[Trial] = []
    left_out: list[str] = []
    now = reference.compare(model, "measuring")

    def look_at_the_clock() -> None:
        if budget is not None and time.perf_counter() - start > budget:
            raise BudgetSpent(f"{budget:g} s")

    for each in track(passes, "repairing"):
        try:
            with interruptible(look_at_the_clock):
                may_go_on()
                compute = functools.partial(
                    _try, model, each, examples, fitted, learned, reference, now, calibrators
                )
                trial = compute() if keeper is None else keeper(each, compute)
        except BudgetSpent:
            left_out.append(getattr(each, "__name__", repr(each)))
            continue
        now = trial.after if trial.kept else now
        trials.append(trial)
    score_after, put_back = score_before, False
    if scorer is not None and score_before is not None and any(trial.kept for trial in trials):
        score_after = scorer.evaluate(model)
        worse = score_after.value - score_before.value
        put_back = (-worse if scorer.higher_is_better else worse) > 0
        if put_back:
            untouched.restore()
    return Repairs(
        tuple(trials),
        by,
        sum(map(model.captured.batch_size, learned)),
        reference.examples,
        time.perf_counter() - start,
        tuple(left_out),
        None if score_before is None else score_before.value,
        None if score_after is None else score_after.value,
        put_back,
    )


def _try(
    model: QuantizedModel,
    each: Pass,
    examples: Sequence[ModelInputs],
    fitted: Sequence[ModelInputs],
    learned: Sequence[ModelInputs],
    reference: Reference,
    before: Fidelity,
    calibrators: BestOf,
) -> Trial:
    """Run one repair, choose calibrators again where it changed distributions, and keep it if it measures better."""
    snapshot = Snapshot.of(model)
    try:
        done = each(model, learned)
        if not done.treated:
            return Trial(done, before, before, kept=False)
        if moved := activation_sites(model).keys() & set(done.moved):
            fitted_to = Reference(model, calibrators.examples, fitted)
            chosen = calibrate_moved(model, moved, examples, calibrators, fitted_to)
            alone = f"{chosen} ({chosen.fidelity.noise()} alone)"
            note = f"activations' calibrators chosen again after {done.name}: {alone}"
            done = replace(done, notes=(*done.notes, note))
        with protected():  # of a pass that time cut short too
            after = reference.compare(model, "measuring")
    except BaseException:
        snapshot.restore()
        raise
    kept = after.loss(reference.by) < before.loss(reference.by)
    if not kept:
        snapshot.restore()
    return Trial(done, before, after, kept)


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
        self._done: dict[LayerPrecision, Refit] = {}

    def __call__(self) -> None:
        """Fit anew what is to be, or take what was fitted to the very same network; :data:`REFIT_SECONDS` for all."""
        model = self.model
        wanted = {name: model.compensations.kinds(name) for name in sorted(model.compensations.missing)}
        if not wanted:
            return
        key = self.checkpoints.key_of("refit", wanted)
        if (saved := self.checkpoints.journal.load("refit", key)) is not None:
            self._done[model.precision] = Refit.of(saved.data)
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
        self._done[model.precision] = done
        tensors = self._fitted(wanted)
        self._put(wanted, tensors)
        if done.whole:
            self.checkpoints.journal.save("refit", tensors, key, exact(asdict(done)))

    def sentence(self) -> str:
        """What was done for the layers that are put back now; empty if nothing was."""
        done = self._done.get(self.model.precision)
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
