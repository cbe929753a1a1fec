"""The float model's score, which all drops are measured from, and whether the metric answers the same twice."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from halfstep.batches import scored
from halfstep.errors import DataError, RunError
from halfstep.evaluate import Accuracy, Metric, Score, Scorer, parts
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import float_tensors
from halfstep.journal import Journal
from halfstep.ladder.evaluation import Evaluation, Verdict, keep, kept
from halfstep.model import QuantizedModel
from halfstep.progress import steps

#: Examples on which the float model is scored a second time, to see whether the metric answers the same.
REPEATED = 1000
#: What scores may depend on in their last digits.
PLACE = ("processor", "instructions", "torch", "accelerator")
AGAIN = "float again, for the metric's noise"


def timed_evaluation(scorer: Scorer, model: Callable[..., Any], what: str) -> tuple[Score, Evaluation]:
    """Score ``model`` and tell the progress listener of it."""
    start = time.perf_counter()
    with steps(f"evaluating {what}"):
        score = scorer.evaluate(model)
    return score, Evaluation(what, score.value, time.perf_counter() - start, score.count, score.count)


def float_evaluation(
    scorer: Scorer, model: QuantizedModel, journal: Journal | None = None, unseen: Sequence[str] = ()
) -> tuple[Score, list[Evaluation]]:
    """Score the float network, once on everything and once more on a part, to see whether the metric repeats itself.

    The float network is the user's model in the precision that it was handed over in. Warns where the metric does not:
    a drop smaller than its own noise cannot be seen. Where the examples come in another order each time, the score is
    returned without those of single examples, since nothing could be paired.

    Args:
        scorer: the metric.
        model: in whatever mode.
        journal: remembers what was evaluated before.
        unseen: what the metric depends on beside what was compared with an earlier run's; if there is any, a part of
            what is remembered is scored again.

    Returns:
        The score, and the evaluations made.

    Raises:
        RunError: if the float model scores otherwise now than the journal says.
        DataError: if it answers NaN, naming the batch where the metric is one over labelled data.
    """
    journal = journal or Journal()
    made: list[Evaluation] = []
    # In float32 it is the model itself, which may run in pieces.
    network = scored(model, scorer) if model.handed_over is model else model.handed_over

    def once(what: str, key: str, score_it: Callable[[], tuple[Score, int | None]]) -> Score:
        for entry in journal.of("evaluation"):
            if entry.data["key"] == key:
                return kept(entry)[1].score
        start = time.perf_counter()
        with steps(f"evaluating {what}"):
            score, total = score_it()
        seconds = time.perf_counter() - start
        made.append(Evaluation(what, score.value, seconds, score.count, total, key, "float"))
        keep(journal, made[-1], Verdict(True, score, complete=True))
        return score

    def whole() -> tuple[Score, int | None]:
        score = scorer.evaluate(network)
        return score, score.count

    def part() -> tuple[Score, int | None]:
        assert isinstance(scorer, Metric)
        taken: list[torch.Tensor] = []
        for scores in scorer.stream(network):
            taken.append(scores)
            if sum(map(len, taken)) >= REPEATED:
                break
        return Score.mean(torch.cat(taken)), first.count

    with model.using(Mode.FLOAT), _answering(network):
        first = once("float", "float", whole)
        if unseen and not made:
            with steps("evaluating float again, since the run goes on"):
                some = isinstance(scorer, Metric) and first.per_example is not None
                _see_that_it_is(first, (part() if some else whole())[0], journal)
        if isinstance(scorer, Metric) and first.per_example is not None:
            again = once(AGAIN, "float again", part).per_example
            if again is not None and torch.equal(again, first.per_example[: len(again)]):
                return first, made
        second = once(AGAIN, "float again, whole", whole)
    others = {name: _compared(score, second.others[name], name) for name, score in first.others.items()}
    return replace(_compared(first, second, next(iter(parts(scorer)))), others=others), made


@contextmanager
def _answering(network: nn.Module) -> Iterator[None]:
    """Raise where the float network answers NaN: most metrics count that as a mistake, of which codes know nothing.

    What is quantized answers numbers there, and would be said to be better than the float network by as much.
    """

    def check(_: nn.Module, inputs: Any, outputs: Any) -> None:
        for tensor in float_tensors(outputs):
            if bad := int(tensor.isnan().sum()):
                raise DataError(
                    f"the float model answers NaN, in {bad} of {tensor.numel()} numbers of an output; nothing can be "
                    "compared with that: look for NaN in the data, and leave those examples out"
                )

    handle = network.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def guesses(scorer: Scorer, score: Score) -> list[str]:
    """A sentence for each accuracy of the float model that is no better than that of one answer to all examples.

    Such a model loses nothing by being quantized, and meets every goal. "No better" is within two standard deviations
    of as many draws as there are examples: a model that guesses stays below that in 98 of 100 cases, or more where the
    labels are not equally frequent. Nothing is said of a model that is right on all examples, nor of one that is right
    on most of what a loader makes anew: one more pass over that may take as long as an evaluation.

    Args:
        scorer: the metric; of others than :class:`halfstep.Accuracy` it is not known what guessing scores.
        score: of the float model.
    """
    found = []
    for name, part in parts(scorer).items():
        value = score.others.get(name, score).value
        if not isinstance(part, Accuracy) or value == 1:
            continue
        if value > 0.5 and not isinstance(part.labelled, (list, tuple)):
            continue
        share, count = part.of_one_answer()
        if share < 1 and value <= share + 2 * math.sqrt(share * (1 - share) / count):
            answer = "one class" if part.top == 1 else f"the same {part.top} classes"
            found.append(
                f"The float model's accuracy{f' {name!r}' * bool(name)} is {value:.4g}, no better than by guessing: "
                f"always giving {answer} is right on {share:.4g} of the {count:,} examples. Were the weights loaded? "
                "And are the inputs prepared, and the classes numbered, as in its training?"
            )
    return found


def _see_that_it_is(known: Score, now: Score, journal: Journal) -> None:
    """Raise unless the float model scores as it did when the journal was begun.

    On the same processor to the last digits, but for the metric's own noise; on another one a single example in a
    hundred may fall to the other side.
    """
    here = [{name: entry.data["packages"].get(name) for name in PLACE} for entry in journal.of("environment")]
    tolerance, others = (1e-6, 0.0) if all(place == here[0] for place in here) else (1e-3, 0.01)
    paired = not any(entry.data["paired"] is False for entry in journal.of("paired"))
    again = [kept(e)[1].score for e in journal.of("evaluation") if e.data["key"] == "float again, whole"]
    for name in ("", *known.others):
        before, after = (score.others[name] if name else score for score in (known, now))
        value = before.value
        if paired and before.per_example is not None and after.per_example is not None:
            examples = before.per_example[: len(after.per_example)]
            value = float(examples.mean())
            off = (after.per_example - examples).abs() > tolerance * examples.abs().clamp_min(1.0)
            same = float(off.double().mean()) <= others
        else:
            repeated = [score.others[name].value if name else score.value for score in again]
            noise = 3 * max((abs(other - value) for other in repeated), default=0.0)
            same = abs(after.value - value) <= noise + (tolerance + others) * max(abs(value), 1e-3)
        if not same:
            raise RunError(
                f"directory {journal.folder} belongs to a run with another metric: {f'by {name!r} ' * bool(name)}the "
                f"float model scores {after.value:.6g} now, and {value:.6g} when the run began; choose another "
                "directory, or begin anew in this one with fresh=True (--fresh)"
            )


def _compared(first: Score, second: Score, name: str) -> Score:
    """The score to go on with, after two evaluations of the same model by the metric of that name."""
    metric = f"metric {name!r}" if name else "metric"
    noise = abs(first.value - second.value)
    if noise > 1e-12 * max(abs(first.value), 1.0):
        warnings.warn(
            f"{metric}: the float model scores {first.value:.6g}, and {second.value:.6g} when scored again: drops "
            f"smaller than that difference ({noise:.2g}) cannot be told from noise; make the metric repeat itself "
            "(fixed seeds, no random augmentation, no sampling)",
            stacklevel=3,
        )
    if not first.paired or first.repeats(second):
        return first
    warnings.warn(
        f"{metric}: the scores of single examples differ between two evaluations of the float model, so candidates "
        "cannot be compared with it example by example; give the examples in the same order each time "
        "(a loader with shuffle=False)",
        stacklevel=3,
    )
    return first.unpaired()
