"""Several metrics of one model, scored together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from halfstep.distributed import in_turns
from halfstep.errors import MetricError, named
from halfstep.evaluate.against_float import AgainstFloat, Agreement, answered
from halfstep.evaluate.metric import Accuracy, as_scorer
from halfstep.evaluate.score import DataMetric, Labelled, Score, Scorer, answer_to


class Several:
    """Metrics by name. The first one leads: where a single number is shown, it is that one's.

    Metrics over the same labelled data share the passes over them.

    Args:
        metrics: each as for :func:`halfstep.quantize`.

    Raises:
        MetricError: if there is none, one of them is no metric, or a name is no text.
    """

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        if not metrics:
            raise MetricError("metric: got no metric, needed at least one by name")
        self.metrics: dict[str, Scorer] = {}
        for name, metric in metrics.items():
            if not (isinstance(name, str) and name):
                raise MetricError(f"metric: got the name {name!r}, needed a text, such as 'worst class'")
            with named(f"{name!r}"):
                self.metrics[name] = as_scorer(metric)
        self.higher_is_better = next(iter(self.metrics.values())).higher_is_better

    def evaluate(self, model: Callable[..., Any]) -> Score:
        """The first metric's score, with the others in it.

        Raises:
            MetricError: naming the metric that failed.
        """
        found: dict[str, Score] = {}
        for names in self._sharing():
            found |= self._shared(names, model) if len(names) > 1 else self._alone(names[0], model)
        leading, *others = self.metrics
        return replace(found[leading], others={name: found[name] for name in others})

    def _sharing(self) -> list[list[str]]:
        """The names of metrics that one pass over the data can serve, together."""
        groups: dict[int, list[str]] = {}
        for name, metric in self.metrics.items():
            data = metric.labelled if isinstance(metric, DataMetric) and metric.plain else metric
            groups.setdefault(id(data), []).append(name)
        return list(groups.values())

    def _alone(self, name: str, model: Callable[..., Any]) -> dict[str, Score]:
        with named(f"{name!r}"):
            return {name: self.metrics[name].evaluate(model)}

    def _shared(self, names: Sequence[str], model: Callable[..., Any]) -> dict[str, Score]:
        metrics = {name: metric for name in names if isinstance(metric := self.metrics[name], DataMetric)}
        taken: dict[str, list[Any]] = {name: [] for name in names}
        work = functools.partial(_scored_by_each, metrics, model)
        for scores in in_turns(work, metrics[names[0]].labelled):
            for name in names:
                taken[name].append(scores[name])
        found = {}
        for name, metric in metrics.items():
            with named(f"{name!r}"):
                found[name] = metric.joined(taken[name])
        return found


def _scored_by_each(
    metrics: Mapping[str, DataMetric], model: Callable[..., Any], index: int, item: Any
) -> dict[str, Any]:
    """What each metric keeps of a batch."""
    answer, found = answer_to(model, index, item), {}
    for name, metric in metrics.items():
        with named(f"{name!r}"):
            found[name] = metric.scores(answer)
    return found


def as_scorers(metric: Any) -> Scorer:
    """``metric`` as a scorer, where several by name are allowed too.

    Raises:
        MetricError: as :func:`as_scorer` and :class:`Several`.
    """
    return Several(metric) if isinstance(metric, Mapping) else as_scorer(metric)


def parts(scorer: Scorer) -> Mapping[str, Scorer]:
    """The metrics of ``scorer`` by name; one that is alone has the name ``""``."""
    return scorer.metrics if isinstance(scorer, Several) else {"": scorer}


def classifies(scorer: Scorer) -> bool:
    """Whether a metric of ``scorer`` looks for the largest logit, so that outputs are known to be logits."""
    return any(isinstance(part, (Accuracy, Agreement)) for part in parts(scorer).values())


def labelled_data(scorer: Scorer) -> list[Labelled]:
    """The different labelled data that the metrics of ``scorer`` judge on, where that can be seen."""
    found = {
        id(metric.source): metric.labelled
        for metric in parts(scorer).values()
        if isinstance(metric, DataMetric)
    }
    return list(found.values())


def against(scorer: Scorer, model: Callable[..., Any]) -> Scorer:
    """``scorer``, those of its metrics that compare with a float model and know none yet with the answers of ``model``.

    Raises:
        MetricError: if an answer is none that can be compared with.
        DataError: naming the batch, if the model does not take its inputs.
    """
    known = parts(scorer)
    waiting = {
        name: part for name, part in known.items() if isinstance(part, AgainstFloat) and part.place is None
    }
    if not waiting:
        return scorer
    complete = {**known, **answered(waiting, model)}
    return Several(complete) if isinstance(scorer, Several) else complete[""]
