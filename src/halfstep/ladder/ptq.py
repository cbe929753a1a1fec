"""Rung 1, post-training quantization: every calibrator on the same statistics."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from halfstep.calibration.calibrate import kept_examples
from halfstep.calibration.candidates import FINALISTS, MIXED, BestOf, Sweep
from halfstep.calibration.diagnostics import sentences
from halfstep.calibration.sweep import judge, mix, passes_at_most, sweep
from halfstep.calibrators import Calibrator, WeightCalibrator
from halfstep.evaluate import Score, classifies
from halfstep.identity import Identity
from halfstep.journal import exact
from halfstep.ladder.repairs import PASSES, THOROUGH, Pass, Trial, repair
from halfstep.ladder.rung import Cost, Rung
from halfstep.ladder.search import Search
from halfstep.model import QuantizedModel
from halfstep.snapshot import Snapshot

#: Repairs end after so many seconds.
REPAIR_SECONDS = 600.0


@dataclass(frozen=True)
class PTQ(Rung):
    """Post-training quantization: the calibrator that the metric likes best, repaired where that is not enough.

    Attributes:
        options: which calibrators to try; None for all, ranked by the divergence of the outputs if a metric is an
            :class:`Accuracy`, else by their signal to noise.
    """

    name, title = "ptq", "Post-training quantization"
    options: BestOf | None = None

    def climb(self, search: Search) -> Score:
        """See :func:`climb_ptq`."""
        return climb_ptq(search, self.options)

    def cost(self, search: Search) -> Cost:
        """The finalists, and the best one repaired quickly and thoroughly; every calibrator on the kept examples."""
        finalists = FINALISTS if self.options is None else self.options.finalists
        left = search.seconds_left()
        seconds = REPAIR_SECONDS if left is None else min(REPAIR_SECONDS, max(0.0, left))
        return Cost(finalists + 2, passes_at_most(self.options) * kept_examples(search.model), seconds)

    def identity(self) -> str:
        """The options, where they are not the usual ones."""
        return "" if self.options is None else repr(self.options)


def climb_ptq(search: Search, options: BestOf | None = None) -> Score:
    """Rank every calibrator without labels, evaluate the metric on the best few, and return the best score.

    Evaluation stops at the first candidate that meets the goal: whatever is left would only polish. So a calibrator for
    each site is looked for only where the nearest one for all sites misses. If none meets the goal, the best one is
    repaired, within :data:`REPAIR_SECONDS` or what the budget leaves: first by the quick passes, then, if the goal is
    still missed, by the thorough ones. Either stay if the metric rises with them.

    Args:
        search: its model observed; it is left with the best candidate's ranges.
        options: what to try; its own metric is not used. None for all calibrators, ranked by the divergence of the
            outputs if a metric is an :class:`Accuracy`, else by their signal to noise.
    """
    if options is None:
        options = BestOf(by="kl" if classifies(search.scorer) and not search.model.captured.parts else "sqnr")
    uniform = replace(options, metric=None, mixed=False)
    found = _kept_sweep(search, "sweep", uniform, lambda: sweep(search.model, uniform))
    _explain(search, found)
    found, score = _judged(search, found, 1 if options.mixed else options.finalists)
    scored = {str(candidate) for candidate in found.candidates[: found.evaluations]}
    if options.mixed and not search.goal.met(score):  # else it would only polish
        ranked = found
        found = _kept_sweep(search, "mixed", options, lambda: mix(search.model, ranked, options))
        if found.best.activations == MIXED:
            search.decide(f"a calibrator for each site brings the outputs nearer: {found.best.fidelity}")
        found, score = _judged(search, found, options.finalists)
        scored |= {str(candidate) for candidate in found.candidates[: found.evaluations]}
    for sentence in sentences(found.concerns):
        search.decide(sentence)
    search.journal.write("sweep", **found.to_dict())
    search.decide(
        f"PTQ with {found.best} scores {search.goal.words(score)}; {len(scored)} of {len(found.candidates)} "
        "candidates were evaluated"
    )
    return score if search.goal.met(score) else _repaired(search, options, score)


def _judged(search: Search, found: Sweep, finalists: int) -> tuple[Sweep, Score]:
    """Let the metric decide among the first few, until one meets the goal; those that are worse early on drop out."""
    return judge(
        found,
        search.model,
        lambda candidate: search.accept(f"PTQ, {candidate}"),
        search.goal.loss,
        search.goal.met,
        finalists,
        lambda candidate, best: search.rivals(f"PTQ, {candidate}", best),
    )


def _kept_sweep(search: Search, name: str, options: BestOf, compute: Callable[[], Sweep]) -> Sweep:
    """A comparison of calibrations: an interrupted run's, or a new one; the model has the best one's ranges."""
    key = Identity(search.checkpoints.key, repr(replace(options, metric=None))).digest
    calibrators: list[Calibrator | WeightCalibrator] = [*options.calibrators, *options.weights]
    if (found := Sweep.kept(search.journal, name, key, calibrators)) is None:
        found = compute()
        found.keep(search.journal, name, key)
    found.best.apply(search.model)
    return found


def _kept(search: Search, options: BestOf, each: Pass, compute: Callable[[], Trial]) -> Trial:
    """What a repair brought: in a run that was interrupted, with what it left the model with; or now."""
    name = getattr(each, "__name__", type(each).__name__)
    key = search.checkpoints.key_of(name, replace(options, metric=None))
    if (saved := search.journal.load(f"repair-{name}", key)) is not None:
        trial = Trial.of(saved.data)
        if trial.kept:
            search.model.load_state_dict(search.checkpoints.network(saved), strict=False)
            _name_calibrators(search.model, options, saved.data.get("calibrators", {}))
        return trial
    trial = compute()
    if trial.repair.cut_short:  # with more time it does more
        return trial
    state = search.model.state_dict() if trial.kept else {}
    chosen: dict[str, str] = {}
    if trial.kept and trial.repair.moved:
        sites = (
            (site.name, search.model.sites[site.name].calibrated_by) for site in search.model.placement.sites
        )
        chosen = {site: str(calibrator) for site, calibrator in sites if calibrator is not None}
    data = {**asdict(trial), "calibrators": chosen}
    search.checkpoints.keep_network(f"repair-{name}", key, state, exact(data))
    return trial


def _name_calibrators(model: QuantizedModel, options: BestOf, names: Mapping[str, str]) -> None:
    """Let sites know by name who gave them their ranges: the next repair that scales asks the same ones."""
    every: list[Calibrator | WeightCalibrator] = [*options.calibrators, *options.weights]
    known = {str(calibrator): calibrator for calibrator in every}
    for site, name in names.items():
        model.sites[site].calibrated_by = known[name]


def _repaired(search: Search, options: BestOf, score: Score) -> Score:
    """Repair the model until it meets the goal, and return the score."""
    end = time.perf_counter() + REPAIR_SECONDS
    done: tuple[str, ...] = ()
    for passes in (PASSES, THOROUGH):
        left = search.seconds_left()
        seconds = min(math.inf if left is None else left, end - time.perf_counter())
        if search.goal.met(score) or seconds <= 0:
            break
        score, done = _tried(search, options, passes, seconds, score, done)
    return score


def _tried(
    search: Search,
    options: BestOf,
    passes: Sequence[Pass],
    seconds: float,
    score: Score,
    done: tuple[str, ...],
) -> tuple[Score, tuple[str, ...]]:
    """Repair the model by some passes, or put it back where the metric does not rise.

    Args:
        search: its model calibrated.
        options: what calibrators to choose among where distributions change.
        passes: what to try.
        seconds: that they may take.
        score: of the model as it is.
        done: the names of the repairs that are in it.

    Returns:
        The score, and the names of the repairs that are in the model now.
    """
    before = Snapshot.of(search.model)
    try:
        further = search.model.reserve if passes is THOROUGH else ()
        keeper = functools.partial(_kept, search, options)
        found = repair(
            search.model, passes, budget=seconds, keeper=keeper, calibrators=options, further=further
        )
        for sentence in dict.fromkeys(found.sentences()):  # two repairs may say the same of a layer
            search.decide(sentence)
        if not found.kept:
            return score, done
        names = (*done, *found.kept)
        words = f"PTQ, repaired by {', '.join(names)}"
        repaired = search.accept(words)
    except BaseException:
        before.restore()
        raise
    if search.goal.loss(repaired) < search.goal.loss(score):
        search.decide(f"{words}: {search.goal.words(repaired)}, {score.value:.4f} before")
        return repaired, names
    before.restore()
    search.decide(f"{words}: put back, {score.value:.4f} would become {repaired.value:.4f}")
    return score, done


def _explain(search: Search, found: Sweep) -> None:
    """Say what the outputs alone told, and what it cost."""
    best, worst = found.candidates[0], found.candidates[-1]
    search.decide(
        f"{len(found.candidates)} calibrations compared on {found.examples} examples without labels, {found.passes} "
        f"passes: best {best} ({best.fidelity}), worst {worst} ({worst.fidelity})"
    )
    if found.activations_alone is not None:
        weights = min(found.weights_alone.values(), key=lambda fidelity: fidelity.loss("sqnr"))
        activations = found.activations_alone
        more = f"the {'weights' if weights.sqnr < activations.sqnr else 'activations'} lose more"
        if weights.sqnr == activations.sqnr:
            more = "neither loses more"
        search.decide(
            f"weights alone leave {weights.noise()}, activations alone {activations.noise()}: {more}"
        )
