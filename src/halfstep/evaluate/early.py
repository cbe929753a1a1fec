"""Early stopping: score a candidate on as many examples as its verdict needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from halfstep.evaluate.metric import Metric
from halfstep.evaluate.order import Shuffled, cannot_shuffle
from halfstep.evaluate.score import Score, Scorer
from halfstep.evaluate.sequential import SequentialTest, Side
from halfstep.evaluate.set_metric import SetMetric
from halfstep.evaluate.several import Several


class EarlyStopping:
    """Scores candidates against a reference, example by example in random order, until it is clear which side wins.

    Args:
        metric: with bounds, over examples in random order.
        reference: the float model's score of every example, in the data's own order.
    """

    def __init__(self, metric: Metric, reference: Score) -> None:
        assert metric.bounds is not None and reference.per_example is not None
        self.metric = metric
        self._widest = metric.bounds[1] - metric.bounds[0]
        self.total = len(reference.per_example)
        self._shuffled = None if metric.shuffled else Shuffled(metric.labelled)  # type: ignore[arg-type]
        self.order = torch.arange(self.total) if self._shuffled is None else self._shuffled.order
        self._reference = reference.per_example[self.order]

    @property
    def picks(self) -> bool:
        """Whether single examples can be picked, so that nothing need be scored again to go on."""
        return self._shuffled is not None

    def scores(self, model: Callable[..., Any], seen: int = 0) -> Iterator[torch.Tensor]:
        """Scores of the examples after the first ``seen``, batch by batch, in the order drawn.

        Those come around again where examples cannot be picked, and are dropped.
        """
        if self._shuffled is not None:
            yield from self.metric.stream(model, self._shuffled.drawn(seen))
            return
        for batch in self.metric.stream(model):
            rest = batch[seen:]
            seen -= len(batch) - len(rest)
            if len(rest):
                yield rest

    def run(
        self,
        model: Callable[..., Any],
        max_drop: float,
        level: float,
        accept: bool = True,
        progress: Callable[[int], None] | None = None,
        seen: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Side | None]:
        """Score ``model`` until its drop is surely above or below ``max_drop``, or to the end.

        Args:
            model: the candidate.
            max_drop: the largest allowed drop, in the metric's unit.
            level: the largest probability that a full evaluation would say otherwise.
            accept: whether to stop for a candidate that is surely good, too.
            progress: called with the number of examples after each batch.
            seen: the scores of an earlier run, which goes on from there: nothing is scored where they suffice.

        Returns:
            The scores of the examples seen, in the order drawn; and the verdict, None if all were seen without one.
        """
        test = SequentialTest(max_drop, -self._widest, self._widest, level, self.total)
        sign = 1 if self.metric.higher_is_better else -1
        taken: list[torch.Tensor] = []
        known = [] if seen is None else [seen]
        for batch in itertools.chain(known, self.scores(model, sum(map(len, known)))):
            start = test.seen
            taken.append(batch)
            side = test.update(sign * (self._reference[start : start + len(batch)] - batch))
            if progress is not None:
                progress(len(batch))
            if side == "above" or (side == "below" and accept):
                break
        scores = torch.cat(taken)
        return scores, None if len(scores) == self.total else test.answer

    def drop(self, score: Score) -> float:
        """How much worse than the reference a candidate is on the examples that :meth:`run` has seen."""
        assert score.count is not None
        difference = float(self._reference[: score.count].mean()) - score.value
        return difference if self.metric.higher_is_better else -difference

    def finish(self, model: Callable[..., Any], scores: torch.Tensor) -> Score:
        """The score over all examples, in the data's own order, given those that :meth:`run` has seen.

        Only the rest are scored where the examples can be picked; a loader is iterated anew.
        """
        if len(scores) < self.total:
            scores = torch.cat([scores, *self.scores(model, len(scores))])
        restored = torch.empty_like(scores)
        restored[self.order] = scores
        return Score.mean(restored)


def early_stopping(scorer: Scorer, reference: Score) -> EarlyStopping | str:
    """Early stopping for ``scorer``, or the reason why there is none, in words."""
    if isinstance(scorer, Several):
        return "several metrics are judged on all examples"
    if isinstance(scorer, SetMetric):
        return "the metric is a number of the whole set, of which some of the examples say nothing sure"
    if not isinstance(scorer, Metric) or reference.per_example is None:
        return "the metric has no scores of single examples (hs.Metric has)"
    if scorer.bounds is None:
        return "the scores have no known bounds (hs.Metric(..., bounds=(0, 1)) says so)"
    if scorer.shuffled:
        return EarlyStopping(scorer, reference)
    if why := cannot_shuffle(scorer.labelled):
        return (
            f"the examples come in an order that may carry information, and cannot be put into another: {why}; give a "
            "list of batches of tensors, or say shuffled=True if their order carries none"
        )
    if Shuffled(scorer.labelled).count != len(reference.per_example):  # type: ignore[arg-type]
        return "the score gives another number of scores than there are examples"
    return EarlyStopping(scorer, reference)
