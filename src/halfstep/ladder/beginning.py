"""What every rung starts from: the float score, the statistics, and what is to be said of the data."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

from halfstep.calibration.calibrate import observe
from halfstep.calibration.diagnostics import (
    Seen,
    SiteConcern,
    halving,
    look,
    lost_parts,
    sentences,
    tails,
    unlike_sites,
    watching,
)
from halfstep.distributed import share, together
from halfstep.evaluate import Scorer, labelled_data
from halfstep.graph.inputs import ModelInputs
from halfstep.journal import Journal
from halfstep.ladder.float_score import float_evaluation, guesses
from halfstep.ladder.goal import GoalSpec
from halfstep.ladder.identity import Claimed, Examples, data_warnings
from halfstep.ladder.search import Search
from halfstep.model import QuantizedModel
from halfstep.progress import Budget


def begin(
    journal: Journal,
    prepared: QuantizedModel,
    scorer: Scorer,
    aim: GoalSpec,
    calibration: Iterable[ModelInputs],
    budget: Budget,
    claimed: Claimed,
) -> Search:
    """The float baseline and the statistics, with what is to be said of the data: what every rung starts from."""
    data = labelled_data(scorer)
    seen = Seen(prepared)
    with nullcontext() if data else watching(prepared, seen):
        baseline, _ = float_evaluation(scorer, prepared, journal, claimed.unseen)
    scores = (baseline, *baseline.others.values())
    journal.write("paired", paired=any(score.paired for score in scores))
    search = Search(prepared, scorer, aim.goal(baseline, scorer), journal=journal, budget=budget, rung="data")
    for note in prepared.captured.notes:
        search.decide(note, aloud=False)  # a warning has said it
    for sentence in tails(prepared):
        search.decide(sentence)
    if claimed.unseen and journal.folder is not None:
        search.decide(
            f"What cannot be compared when this run goes on: {', '.join(claimed.unseen)}. The float model is scored "
            "again then, to see that it scores the same; fresh=True (--fresh) begins anew"
        )
    if claimed.unseen_in_training and journal.folder is not None:
        search.decide(
            f"What cannot be compared of the training: {', '.join(claimed.unseen_in_training)}. Where it changes and "
            "this run goes on, what was trained before stays; fresh=True (--fresh) begins anew"
        )
    kept = search.checkpoints.statistics()
    if kept is None:
        if data:
            spread = all(isinstance(batches, (list, tuple)) for batches in data)
            seen = Seen(prepared, len(claimed.judged.seen) if spread else 0)
            look(prepared, (item[0] for batches in data for item in batches), seen)
        said = _observe(search, calibration, claimed.judged, seen, guesses(scorer, baseline))
        for sentence in said:
            warnings.warn(sentence, stacklevel=3)
    else:
        said, examples = kept
        search.calibrated = len(examples)
        said = [*said, *_compare(calibration, examples, search)]
    for sentence in said:
        search.decide(sentence, aloud=False)  # a warning is heard anyway
    for sentence in sentences(lost_parts(prepared)):
        search.decide(sentence)
    search.rung = ""
    return search


def _observe(
    search: Search, calibration: Iterable[ModelInputs], judged: Examples, seen: Seen, known: Sequence[str]
) -> list[str]:
    """Observe the calibration data and keep the statistics; what is known and to be said of the data, in sentences."""
    model = search.model
    calibrated, unsteady = together(_observed, model, calibration)
    said = [*known, *data_warnings(calibrated, judged), *sentences([*unlike_sites(model, seen), *unsteady])]
    if isinstance(calibration, (list, tuple)):
        search.journal.claim("calibration data", calibrated.contents())
    search.calibrated = len(calibrated.seen)
    search.checkpoints.keep_statistics(said, calibrated.seen)
    return said


def _observed(
    model: QuantizedModel, calibration: Iterable[ModelInputs]
) -> tuple[Examples, list[SiteConcern]]:
    """Observe the calibration data; their digests, and where their halves differ."""
    calibrated = Examples(model.captured)
    with halving(model) as unsteady:
        observe(model, _watched(calibration, calibrated))
        share().same(
            "calibration data", calibrated.digest()[:8], "give every rank the same data in the same order"
        )
    return calibrated, unsteady


def _compare(calibration: Iterable[ModelInputs], known: Sequence[bytes], search: Search) -> list[str]:
    """See whether the calibration data are those that the kept statistics come from; what is to be said, in sentences.

    Raises:
        RunError: if they are others, in a list or tuple, which is the same each time.
    """
    calibrated = Examples(search.model.captured)
    for inputs in calibration:
        calibrated.add(inputs)
    if isinstance(calibration, (list, tuple)):
        search.journal.claim("calibration data", calibrated.contents())
    both = (Counter(calibrated.seen) & Counter(known)).total()
    if both == len(known) == len(calibrated.seen):
        return []
    return [
        f"The calibration data come otherwise than before ({both:,} of {len(known):,} examples are the same), as in "
        "random order or with augmentation: ranges rest on the examples that were seen first; with other data on "
        "purpose, begin anew with fresh=True (--fresh)"
    ]


def _watched(batches: Iterable[ModelInputs], examples: Examples) -> Iterator[ModelInputs]:
    for inputs in batches:
        yield inputs
        examples.add(inputs)  # after the model has accepted it
