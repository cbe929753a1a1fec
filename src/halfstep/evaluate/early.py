"""Early stopping: score a candidate on as many examples as its verdict needs.

Labelled batches in a random order of their examples, without a copy of the data.

A test that may look after every example: is the mean of bounded differences above a threshold, or not?
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from halfstep.evaluate.metric import Metric
from halfstep.evaluate.score import Score, Scorer
from halfstep.evaluate.set_metric import SetMetric
from halfstep.evaluate.several import Several


class Shuffled:
    """The examples of a list of batches, drawn in an order of our own.

    Args:
        batches: ``(inputs, labels)`` pairs whose leaves are tensors with the batch in their first dimension.
        seed: of the order.
    """

    def __init__(self, batches: Sequence[tuple[Any, Any]], seed: int = 0) -> None:
        self.batches, self.seed = batches, seed
        sizes = torch.tensor([len(pytree.tree_leaves(batch)[0]) for batch in batches])
        self._ends = sizes.cumsum(0)
        self._size = int(sizes.max())
        self.count = int(self._ends[-1])
        #: The place of each drawn example in the data as given, (n,).
        self.order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))

    def __reduce__(self) -> tuple[Any, ...]:
        """Made again of the same batches, which every rank of a run has."""
        return Shuffled, (self.batches, self.seed)

    def drawn(self, start: int = 0) -> Iterator[tuple[Any, Any]]:
        """Batches of the examples from the ``start``-th drawn one on, as large as the given ones."""
        for places in self.order[start:].split(self._size):
            owners = torch.searchsorted(self._ends, places, right=True)
            parts, positions = [], []
            for owner in owners.unique().tolist():
                members = (owners == owner).nonzero().flatten()
                begin = int(self._ends[owner - 1]) if owner else 0
                rows = places[members] - begin
                parts.append(
                    pytree.tree_map(lambda leaf, rows=rows: leaf[rows.to(leaf.device)], self.batches[owner])
                )
                positions.append(members)
            back = torch.cat(positions).argsort()
            yield pytree.tree_map(
                lambda *leaves, back=back: torch.cat(leaves)[back.to(leaves[0].device)], *parts
            )


@dataclass(frozen=True)
class Rest:
    """The batches of :meth:`Shuffled.drawn` from an example on, as often as they are iterated."""

    shuffled: Shuffled
    start: int

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self.shuffled.drawn(self.start)


def cannot_shuffle(labelled: object) -> str:
    """Why the examples of ``labelled`` cannot be picked one by one and put together anew; empty if they can.

    They can in a list of batches of tensors that differ in nothing but how many examples they hold.
    """
    if not isinstance(labelled, (list, tuple)) or not labelled:
        return "the data are no list of batches"
    kinds = []
    for batch in labelled:
        leaves, structure = pytree.tree_flatten(batch)
        if not leaves or not all(isinstance(leaf, torch.Tensor) and leaf.dim() for leaf in leaves):
            return "the batches hold something else than tensors of examples"
        if len({len(leaf) for leaf in leaves}) > 1:
            return "the tensors of a batch differ in their first dimension"
        kinds.append((structure, [(leaf.dtype, tuple(leaf.shape[1:])) for leaf in leaves]))
    for index, kind in enumerate(kinds):
        if kind != kinds[0]:
            return f"batch {index} has examples of another shape or dtype than batch 0, as padding batch by batch makes"
    return ""


#: What is staked on each side, as shares of the most that cannot go bankrupt, and the shares of the capital that are
#: staked so: most of it for the middle, where the hard cases are, which the clear ones at both ends can spare.
STAKES = {0.02: 0.3, 0.04: 0.5, 0.08: 1.0, 0.15: 2.0, 0.3: 2.0, 0.5: 1.0, 0.75: 0.5, 0.95: 0.3}


MOST = max(STAKES)

Side = Literal["above", "below"]


class SequentialTest:
    """Two gamblers, one of whom must lose: the first bets that the mean is above the threshold, the second below.

    The odds are fair if the mean *is* the threshold. A gambler who starts with 1 and bets against the truth reaches
    1 / level with a probability of at most ``level``, however often one looks (Ville's inequality), so his
    reaching it is evidence at that level. Each spreads his capital over stakes from small (for a mean near the
    threshold) to large (for one far off).

    With a known ``total`` the examples are drawn without replacement and the mean is that of all of them: what a
    full evaluation would say. The fair odds then follow from what is left, and the test ends with certainty at the
    latest when the rest cannot change the answer. The stakes grow as total / left, since the fair odds move away from
    the truth so: what the threshold would still need, the fewer examples must bring. That is how the likelihood ratio
    of two means of the whole grows.

    Valid only for examples in random order.

    Args:
        threshold: a mean equal to it counts as below.
        low: the smallest possible difference.
        high: the largest possible one.
        level: the largest probability of a wrong answer on either side, such as 0.05.
        total: how many examples there are; None for a mean over the population that they are a sample of.

    >>> test = SequentialTest(threshold=0.01, low=-1.0, high=1.0, level=0.05)
    >>> test.update(torch.ones(20))  # 20 differences of 1
    'above'

    Source: Waudby-Smith and Ramdas, Journal of the Royal Statistical Society B 86 (2024), the capital process of a
    bounded mean, with and without replacement; here bet against the one value that matters.
    """

    def __init__(
        self, threshold: float, low: float, high: float, level: float, total: int | None = None
    ) -> None:
        self.threshold, self.low, self.high, self.level, self.total = threshold, low, high, level, total
        self.seen, self.sum = 0, 0.0
        self.answer: Side | None = None
        shares = torch.tensor(list(STAKES.values()), dtype=torch.float64)
        # Logarithms of the capital at each stake, (stakes,).
        self._above = self._below = (shares / shares.sum()).log()

    def update(self, differences: torch.Tensor) -> Side | None:
        """Take further differences, (n,), in random order; the answer, or None while there is none.

        An answer once given stands.
        """
        x = differences.double()
        if self.answer is None and len(x):
            drawn = self.seen + torch.arange(len(x), dtype=torch.float64)
            mean, possible = self._fair_means(x, drawn)
            stakes = self._stakes(drawn)
            above = self._bet(self._above, stakes * ((x - mean) / (mean - self.low))[:, None], possible)
            below = self._bet(self._below, stakes * ((mean - x) / (self.high - mean))[:, None], possible)
            self.seen += len(x)
            self.sum += float(x.sum())
            self.answer = self._certain() or self._first(above, below)
            self._above, self._below = above[-1], below[-1]
        return self.answer

    def _stakes(self, drawn: torch.Tensor) -> torch.Tensor:
        """The stakes after so many examples, (n, stakes)."""
        grown = torch.ones_like(drawn) if self.total is None else self.total / (self.total - drawn)
        return (grown[:, None] * torch.tensor(list(STAKES), dtype=torch.float64)).clamp(max=MOST)

    def _fair_means(self, x: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left before each example must average this for the threshold to be the mean, (n,); and if it can."""
        if self.total is None:
            mean = torch.full_like(x, self.threshold)
        else:
            sums = self.sum + torch.cumsum(x, 0) - x
            mean = (self.total * self.threshold - sums) / (self.total - drawn)
        margin = 1e-9 * (self.high - self.low)
        # Where the rest cannot have that mean there is nothing to bet on: certainty is around the corner.
        possible = (mean > self.low + margin) & (mean < self.high - margin)
        return torch.where(possible, mean, (self.low + self.high) / 2), possible

    @staticmethod
    def _bet(capital: torch.Tensor, gain: torch.Tensor, possible: torch.Tensor) -> torch.Tensor:
        """Logarithms of the capital after each example, (n, stakes)."""
        growth = torch.log1p(gain) * possible[:, None]
        return capital + torch.cumsum(growth, 0)

    def _first(self, above: torch.Tensor, below: torch.Tensor) -> Side | None:
        """Whose capital, of all stakes together, reaches 1 / level first."""
        needed = -math.log(self.level)
        sides: tuple[tuple[torch.Tensor, Side], ...] = ((above, "above"), (below, "below"))
        reached = [(capital.logsumexp(1) >= needed, side) for capital, side in sides]
        firsts = [(int(rich.nonzero()[0]), side) for rich, side in reached if rich.any()]
        return min(firsts)[1] if firsts else None

    def _certain(self) -> Side | None:
        """The answer where what is left cannot change it."""
        if self.total is None:
            return None
        left, tolerance = self.total - self.seen, 1e-12 * self.total
        if self.sum + left * self.low > self.total * self.threshold + tolerance:
            return "above"
        if self.sum + left * self.high <= self.total * self.threshold + tolerance:
            return "below"
        return None


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
            yield from self.metric.stream(model, Rest(self._shuffled, seen))
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
