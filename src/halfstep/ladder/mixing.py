"""A calibrator for each site: proposed by one backward pass, accepted by the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Reference
from halfstep.fidelity.fisher import influences
from halfstep.ladder.best_of import BestOf
from halfstep.ladder.candidates import FLOAT, MIXED, Candidate, Sweep, site_concerns
from halfstep.model import QuantizedModel
from halfstep.ranges import Answer, activation_sites, set_ranges

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
) -> list[tuple[str, Answer]]:
    """Sites where another calibrator promises nearer outputs, with its answer, the most promising first."""
    choices: dict[str, list[Answer]] = {}
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
    proposals: Sequence[tuple[str, Answer]],
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
