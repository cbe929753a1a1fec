"""Every calibrator on the same statistics, and a calibrator for each site.

Every calibrator on the same statistics: ranked by what they do to the outputs, without labels.

A calibrator for each site: proposed by one backward pass, accepted by the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from halfstep.calibration.candidates import FINALISTS, FLOAT, MIXED, BestOf, Candidate, Sweep, site_concerns
from halfstep.evaluate import Score, as_scorer
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Fidelity, Reference
from halfstep.fidelity.fisher import influences
from halfstep.fidelity.reference import knowing_float
from halfstep.model import QuantizedModel
from halfstep.ranges import (
    Answers,
    SiteRange,
    activation_answers,
    activation_sites,
    set_ranges,
    weight_answers,
)


def sweep(model: QuantizedModel, options: BestOf) -> Sweep:
    """Try every calibrator on what was observed, and leave the model with the winner's ranges.

    The weights' calibrator is chosen first, with activations in float: what rounding them costs hardly depends on the
    activations. Calibrators that answer alike are tried once.

    Args:
        model: observed.
        options: what to try, and who decides.

    Raises:
        NotObservedError: naming a site that saw no data, or if no example was kept.
        ArgumentError: the model's outputs cannot be measured so.
    """
    reference = Reference(model, options.examples)
    reference.check(options.by)
    runs = _Runs(model, reference, options)
    found = runs.sweep()
    if options.mixed:
        found = mix(model, found, options, reference)
    found.best.apply(model)
    if options.metric is not None:
        scorer = knowing_float(as_scorer(options.metric), model)
        sign = -1.0 if scorer.higher_is_better else 1.0
        found, _ = judge(
            found,
            model,
            lambda _: scorer.evaluate(model),
            lambda s: sign * s.value,
            lambda _: False,
            options.finalists,
        )
    return found


def sweep_activations(model: QuantizedModel, options: BestOf, reference: Reference) -> Sweep:
    """Try every calibrator of the activations, with weights in float: they may become others yet.

    The model is left with the winner's ranges, and its weights with theirs.

    Args:
        model: observed, with activations to quantize.
        options: what to try; the measure alone decides.
        reference: examples to compare outputs on.

    Raises:
        NotObservedError: naming a site that saw no data.
        ArgumentError: the model's outputs cannot be measured so.
    """
    reference.check(options.by)
    found = _Runs(model, reference, options).sweep_activations()
    if options.mixed:
        found = mix(model, found, options, reference)
    found.best.apply(model)
    return found


def passes_at_most(options: BestOf | None = None) -> int:
    """A bound on the passes of a sweep over its examples.

    The float network's own, each calibrator of the weights and of the activations, the activations alone, and mixing.
    """
    options = options or BestOf()
    return 2 + len(options.weights) + len(options.calibrators) + options.mixed * PASSES


def judge(
    found: Sweep,
    model: QuantizedModel,
    evaluate: Callable[[Candidate], Score],
    loss: Callable[[Score], float],
    enough: Callable[[Score], bool],
    finalists: int = FINALISTS,
    rivals: Callable[[Candidate, Score], bool] = lambda *_: True,
) -> tuple[Sweep, Score]:
    """Let the metric decide among the first few candidates; the model is left with the winner's ranges.

    Args:
        found: ranked by the measure.
        model: gets each finalist's ranges in turn.
        evaluate: scores the model as it stands, given the candidate that it stands for.
        loss: of a score, less is better; the measure decides ties.
        enough: whether a score is good enough not to look any further.
        finalists: how many are evaluated at most.
        rivals: whether a candidate may be as good as one with that score, the best so far; it is evaluated only then.

    Returns:
        The sweep with scores, winner first, and the winner's score.
    """
    judged: list[tuple[Candidate, Score]] = []
    worse: list[Candidate] = []
    for candidate in found.candidates[:finalists]:
        candidate.apply(model)
        if judged and not rivals(candidate, min((score for _, score in judged), key=loss)):
            worse.append(candidate)
            continue
        score = evaluate(candidate)
        judged.append((replace(candidate, score=score.value), score))
        if enough(score):
            break
    others = (*worse, *found.candidates[len(judged) + len(worse) :])
    judged.sort(key=lambda pair: loss(pair[1]))  # stable: the measure decides ties
    judged[0][0].apply(model)
    ranked = (*(candidate for candidate, _ in judged), *others)
    return replace(found, candidates=ranked, evaluations=len(judged)), judged[0][1]


class _Runs:
    """The steps of a sweep over one reference."""

    def __init__(self, model: QuantizedModel, reference: Reference, options: BestOf) -> None:
        self.model, self.reference, self.options = model, reference, options

    def sweep(self) -> Sweep:
        weights, weights_alone = self._weights()
        both = weights is not None and bool(activation_sites(self.model))
        candidates = self._activations(weights) if activation_sites(self.model) else list(weights_alone)
        candidates.sort(key=self._loss)
        activations_alone = None
        if both:
            candidates[0].apply(self.model)
            activations_alone = self._measure(weights=False)
        return Sweep(
            tuple(candidates),
            self.options.by,
            self.reference.examples,
            self.reference.passes,
            weights_alone={c.weights: c.fidelity for c in weights_alone} if both else {},
            activations_alone=activations_alone,
            concerns=site_concerns(self.model, candidates),
        )

    def sweep_activations(self) -> Sweep:
        candidates = tuple(sorted(self._activations(None), key=self._loss))
        concerns = site_concerns(self.model, candidates)
        return Sweep(
            candidates, self.options.by, self.reference.examples, self.reference.passes, concerns=concerns
        )

    def _weights(self) -> tuple[Candidate | None, list[Candidate]]:
        """The best calibrator of the weights, and all of them, with activations in float."""
        found = []
        for name, answers in _distinct({str(c): weight_answers(self.model, c) for c in self.options.weights}):
            if answers:
                set_ranges(self.model, answers)
                found.append(Candidate(FLOAT, name, self._measure(activations=False), answers=answers))
        return (min(found, key=self._loss) if found else None), found

    def _activations(self, weights: Candidate | None) -> list[Candidate]:
        """Every calibrator of the activations, with the weights' chosen; None leaves weights in float."""
        named = {str(c): activation_answers(self.model, c) for c in self.options.calibrators}
        return [self._candidate(name, answers, weights) for name, answers in _distinct(named)]

    def _candidate(self, name: str, activations: Answers, weights: Candidate | None) -> Candidate:
        answers = {**activations, **(weights.answers if weights else {})}
        set_ranges(self.model, answers)
        fidelity = self._measure(weights=weights is not None)
        return Candidate(name, weights.weights if weights else FLOAT, fidelity, answers=answers)

    def _loss(self, candidate: Candidate) -> float:
        return candidate.fidelity.loss(self.options.by)

    def _measure(self, weights: bool = True, activations: bool = True) -> Fidelity:
        with self.model.using(Mode.QUANTIZE, weights, activations):
            return self.reference.compare(self.model, "comparing calibrators")


def _distinct(every: Mapping[str, Answers]) -> list[tuple[str, Answers]]:
    """Equal answers once, under the names of all that gave them."""
    groups: list[tuple[list[str], Answers]] = []
    for name, answers in every.items():
        for names, other in groups:
            if all(answers[site].agrees(other[site]) for site in answers):
                names.append(name)
                break
        else:
            groups.append(([name], answers))
    return [(" = ".join(names), answers) for names, answers in groups]


#: Passes at most: the float network's, a backward pass (which takes as long as two) with its own forward one, and five
#: mixtures.
PASSES = 1 + 3 + 5


def mix(model: QuantizedModel, found: Sweep, options: BestOf, reference: Reference | None = None) -> Sweep:
    """Add a candidate that takes other calibrators at some sites, if that brings the outputs nearer.

    Args:
        model: the one swept; it is left with the best candidate's ranges.
        found: the uniform candidates.
        options: those of the sweep.
        reference: what the sweep compared with; computed again if None.

    Returns:
        With the mixed candidate first; as it was where there is none, but for the passes.
    """
    uniform = [candidate for candidate in found.candidates if candidate.activations not in (FLOAT, MIXED)]
    if len(uniform) < 2:
        return found
    known = 0 if reference is None else reference.passes
    reference = reference or Reference(model, options.examples)
    best = min(uniform, key=lambda candidate: candidate.fidelity.loss(options.by))
    mixed = _mixed(model, reference, best, _proposals(model, reference, best, uniform, options), options)
    found = replace(found, passes=found.passes + reference.passes - known + 1)
    if mixed is not best:
        candidates = (mixed, *found.candidates)
        found = replace(found, candidates=candidates, concerns=site_concerns(model, candidates))
    found.best.apply(model)
    return found


def _proposals(
    model: QuantizedModel,
    reference: Reference,
    best: Candidate,
    uniform: Sequence[Candidate],
    options: BestOf,
) -> list[tuple[str, SiteRange]]:
    """Sites where another calibrator promises nearer outputs, with its answer, the most promising first."""
    choices: dict[str, list[SiteRange]] = {}
    for site in activation_sites(model):
        choices[site] = [best.answers[site]]
        for candidate in uniform:
            if not any(candidate.answers[site].agrees(other) for other in choices[site]):
                choices[site].append(candidate.answers[site])
    ranges = {site: [(answer.low, answer.high) for answer in some] for site, some in choices.items()}
    losses = influences(model, reference, ranges, options.by)
    gains = {site: loss[0] - min(loss) for site, loss in losses.items()}
    return [
        (site, choices[site][losses[site].index(min(losses[site]))])
        for site in sorted(gains, key=lambda site: -gains[site])
        if gains[site] > 0
    ]


def _mixed(
    model: QuantizedModel,
    reference: Reference,
    uniform: Candidate,
    proposals: Sequence[tuple[str, SiteRange]],
    options: BestOf,
) -> Candidate:
    """The uniform candidate with other calibrators at the sites where that brings the outputs nearer.

    Proposals look at one site at a time; the outputs with all sites quantized decide: on all proposals at once,
    and if that fails, on a quarter of them at a time.
    """
    best = uniform
    for parts in (1, 4):
        size = max(1, -(-len(proposals) // parts))
        for start in range(0, len(proposals), size):
            answers = {**best.answers, **dict(proposals[start : start + size])}
            set_ranges(model, answers)
            with model.using(Mode.QUANTIZE, weights=best.weights != FLOAT):
                fidelity = reference.compare(model, "comparing calibrators")
            other = Candidate(MIXED, best.weights, fidelity, answers=answers)
            best = min(best, other, key=lambda candidate: candidate.fidelity.loss(options.by))
        if best is not uniform or len(proposals) <= 1:
            break
    return best
