"""A metric of a whole set: F1, mean average precision, word error rate, a correlation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from halfstep.errors import HalfstepError, MetricError
from halfstep.evaluate.resampling import resample
from halfstep.evaluate.score import Answer, DataMetric, Labelled, Score, some
from halfstep.graph.inputs import batch_size, tensors_of

#: From the examples of a set, in the form that ``update`` gives them, to the set's number.
Compute = Callable[[Any], Any]


class SetMetric(DataMetric):
    """A number of a whole set of examples that is no mean over them.

    ``update(outputs, labels)`` says of each example what the number rests on, its statistics; ``compute(statistics)``
    makes the number of those of any set. So drops have an interval without another run of the model: sets of the same
    size are drawn from the examples with repeats, the same ones for both models, and computed anew, up to ``resamples``
    times (the paired BCa bootstrap). No verdict is early: the number of some examples says nothing sure of all.

    Args:
        labelled: iterable of ``(inputs, labels)`` batches, in the same order each time; labels may be anything.
        update: ``update(outputs, labels)`` -> statistics of each example in the batch: a tensor (batch, ...), or a list
            of anything, one for each. Or an object with the methods ``update(outputs, labels)``, ``compute()`` and
            ``reset()``, such as torchmetrics': it is reset, updated once with all examples of a set, and computed.
            Outputs and labels that are neither tensors (batch, ...), in containers or not, nor lists cannot be told
            apart by example; then it is updated batch by batch, and the interval is one over batches.
        compute: of the statistics of a set, as one tensor (examples, ...) or one list, to a number. Of an object, what
            takes the number out of what its ``compute()`` returns; None where that is a number.
        higher_is_better: False for errors and losses.
        resamples: how many sets are drawn for an interval.
        seconds: an evaluation spends at most about so many on them, and draws fewer where that is not enough. Where it
            is not for 200, there is no interval, and the outcome says so.

    Raises:
        MetricError: if ``update`` or ``compute`` are none, or fewer than 200 resamples are asked.

    F1 of two classes from what each example adds to true positives, false positives and false negatives:

    >>> def update(outputs, labels):
    ...     said, is_so = outputs[:, 1] > outputs[:, 0], labels == 1
    ...     return torch.stack([said & is_so, said & ~is_so, ~said & is_so], 1).double()
    >>> def f1(statistics):
    ...     hits, false, missed = statistics.sum(0)
    ...     return 2 * hits / (2 * hits + false + missed)
    >>> labelled = [(torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0]]), torch.tensor([1, 0, 0]))]
    >>> round(SetMetric(labelled, update, f1).evaluate(lambda x: x).value, 4)  # 2 * 1 / (2 * 1 + 1 + 0)
    0.6667

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 14; Koehn, Statistical
    Significance Tests for Machine Translation Evaluation (2004), for pairs drawn from a test set.
    """

    def __init__(
        self,
        labelled: Labelled,
        update: Any,
        compute: Compute | None = None,
        higher_is_better: bool = True,
        resamples: int = 1000,
        seconds: float = 10.0,
    ) -> None:
        super().__init__(labelled, higher_is_better)
        self._object = update if accumulates(update) else None
        if self._object is None and not (callable(update) and callable(compute)):
            raise MetricError(
                f"SetMetric: got update {type(update).__name__} and compute {type(compute).__name__}, needed "
                "update(outputs, labels) -> statistics of each example and compute(statistics) -> a number, or one "
                "object with update, compute and reset"
            )
        if resamples < 200 or not seconds > 0:
            raise MetricError(
                f"SetMetric: got {resamples} resamples and {seconds} seconds, needed 200 at least and a time above 0"
            )
        self.update, self.compute, self.resamples, self.seconds = update, compute, resamples, seconds
        if self._object is not None:
            self._object.reset()  # what it holds is no part of what the metric is

    def scores(self, answer: Answer) -> Any:
        """The statistics of a batch's examples; for an object, the outputs and labels themselves.

        Raises:
            MetricError: if ``update`` raises, or gives something else than one for each example.
        """
        if self._object is not None:
            held = pytree.tree_map_only(torch.Tensor, _held, (answer.outputs, answer.labels))
            return *held, batch_size(answer.inputs)
        what = f"update(outputs, labels) (batch {answer.batch})"
        statistics = _called(what, self.update, answer.outputs, answer.labels)
        rows, size = isinstance(statistics, torch.Tensor) and statistics.dim() > 0, batch_size(answer.inputs)
        shape = tensors_of(answer.inputs)[0].shape
        sizes = {size, shape[1] if len(shape) > 2 else size}  # time may be first, and the batch second
        if not (rows or isinstance(statistics, (list, tuple))) or len(statistics) not in sizes:
            got = f"a tensor of shape {tuple(statistics.shape)}" if rows else type(statistics).__name__
            if isinstance(statistics, (list, tuple)):
                got = f"a {got} of {len(statistics)}"
            raise MetricError(
                f"metric: {what} gave {got}, needed the statistics of each of {size} examples: a tensor ({size}, ...) "
                f"or a list of {size}"
            )
        return _held(statistics) if isinstance(statistics, torch.Tensor) else list(statistics)

    def joined(self, batches: Sequence[Any]) -> Score:
        """The number of all examples, with what it is on sets drawn from them.

        Raises:
            MetricError: if there are no examples, ``compute`` or an object's methods raise, or give no finite number.
        """
        some(batches)
        examples = _listed(batches) if self._object is None else _told_apart(batches)
        number = functools.partial(self._number, examples)
        everything = torch.arange(len(examples))
        value = _number_in(number(everything))
        if not math.isfinite(value):
            raise MetricError(f"metric: compute gave {value}, needed a finite number")

        def drawn(places: torch.Tensor) -> float:
            try:
                return _number_in(number(places))
            except MetricError:  # a set may be drawn that has no number, such as one without any positives
                return math.nan

        return Score(
            value, resampled=resample(drawn, len(examples), self.resamples, self.seconds, examples.unit)
        )

    def _number(self, examples: _Examples, places: torch.Tensor) -> Any:
        """What ``compute`` makes of the examples in these places."""
        chosen = examples.pick(places)
        if self._object is None:
            assert self.compute is not None
            return _called("compute(statistics)", self.compute, chosen)
        name = type(self._object).__name__
        _called(f"{name}.reset()", self._object.reset)
        try:
            for outputs, labels in chosen if examples.unit == "batches" else [chosen]:
                _called(f"{name}.update(outputs, labels)", self._object.update, outputs, labels)
            found = _called(f"{name}.compute()", self._object.compute)
        finally:
            self._object.reset()
        return found if self.compute is None else _called("compute", self.compute, found)


class _Examples(Protocol):
    """Something of every example, picked by place."""

    unit: str

    def __len__(self) -> int: ...

    def pick(self, places: torch.Tensor) -> Any:
        """That of the examples in these places, (n,) int64."""
        ...


class _Rows:
    """Tensors (examples, ...), in any container."""

    unit = "examples"

    def __init__(self, tree: Any) -> None:
        self._tree = tree

    def __len__(self) -> int:
        return len(pytree.tree_leaves(self._tree)[0])

    def pick(self, places: torch.Tensor) -> Any:
        return pytree.tree_map(lambda leaf: leaf[places], self._tree)


class _Items:
    """A list of anything."""

    def __init__(self, items: Sequence[Any], unit: str = "examples") -> None:
        self._items, self.unit = items, unit

    def __len__(self) -> int:
        return len(self._items)

    def pick(self, places: torch.Tensor) -> list[Any]:
        return [self._items[place] for place in places.tolist()]


class _Pairs:
    """Outputs and labels, each as they are put together."""

    unit = "examples"

    def __init__(self, outputs: _Examples, labels: _Examples) -> None:
        self._outputs, self._labels = outputs, labels

    def __len__(self) -> int:
        return len(self._outputs)

    def pick(self, places: torch.Tensor) -> tuple[Any, Any]:
        return self._outputs.pick(places), self._labels.pick(places)


def _listed(batches: Sequence[Any]) -> _Examples:
    """The batches' statistics, which are one for each example, put together."""
    if all(isinstance(batch, list) for batch in batches):
        return _Items([item for batch in batches for item in batch])
    rows = _rows(batches, [len(batch) for batch in batches])
    if rows is None:
        kinds = sorted(
            {
                f"({', '.join(map(str, b.shape[1:]))}) of {b.dtype}"
                if isinstance(b, torch.Tensor)
                else "lists"
                for b in batches
            }
        )
        raise MetricError(
            f"metric: update(outputs, labels) gave statistics of several kinds, {' and '.join(kinds)} an example; "
            "needed the same in every batch, or a list of anything"
        )
    return rows


def _told_apart(batches: Sequence[tuple[Any, Any, int]]) -> _Examples:
    """The batches' outputs and labels by example, or where these cannot be told apart, by batch."""
    outputs, labels, sizes = zip(*batches, strict=True)
    columns = [_rows(parts, sizes) or _items(parts, sizes) for parts in (outputs, labels)]
    if columns[0] is None or columns[1] is None:
        return _Items([(out, label) for out, label, _ in batches], "batches")
    return _Pairs(columns[0], columns[1])


def _rows(parts: Sequence[Any], sizes: Sequence[int]) -> _Rows | None:
    """Tensors (batch, ...) put together, in the same containers; None where they are something else."""
    trees = [pytree.tree_flatten(part) for part in parts]
    kinds = {
        (repr(kind), *((leaf.dtype, leaf.shape[1:]) if _has_rows(leaf, size) else () for leaf in leaves))
        for (leaves, kind), size in zip(trees, sizes, strict=True)
    }
    kind = kinds.pop()
    if kinds or () in kind or len(kind) == 1:
        return None
    joined = [torch.cat(column) for column in zip(*(leaves for leaves, _ in trees), strict=True)]
    return _Rows(pytree.tree_unflatten(joined, trees[0][1]))


def _items(parts: Sequence[Any], sizes: Sequence[int]) -> _Items | None:
    """Lists with an item for each example put together; None where they are something else."""
    fits = all(
        isinstance(part, (list, tuple)) and len(part) == n for part, n in zip(parts, sizes, strict=True)
    )
    return _Items([item for part in parts for item in part]) if fits else None


def _has_rows(leaf: Any, size: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and len(leaf) == size


def _held(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor to keep, in memory of its own: models and loaders may use theirs again."""
    return tensor.detach().cpu().clone()


def _called(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the user's function returns.

    Raises:
        MetricError: if it raises.
    """
    try:
        with torch.no_grad():
            return function(*arguments)
    except HalfstepError:
        raise
    except Exception as error:
        raise MetricError(f"metric: {what} raised {type(error).__name__}: {error}") from error


def _number_in(found: Any) -> float:
    """One number as a float.

    Raises:
        MetricError: if it is something else.
    """
    one = not isinstance(found, torch.Tensor) or found.numel() == 1
    if one and not isinstance(found, (str, bytes)):
        try:
            return float(found)
        except (TypeError, ValueError):
            pass
    got = type(found).__name__
    if isinstance(found, torch.Tensor):
        got = f"a tensor of shape {tuple(found.shape)}"
    if isinstance(found, Mapping):
        got += f" with {', '.join(map(repr, found))}"
    raise MetricError(
        f"metric: compute gave {got}, needed one number; of an object that computes several, "
        "compute=lambda found: found['name'] takes one"
    )


def accumulates(metric: object) -> bool:
    """Whether ``metric`` is an object that is updated, computed and reset, as torchmetrics' are."""
    names = ("update", "compute", "reset")
    return not isinstance(metric, (type, DataMetric)) and all(
        callable(getattr(metric, name, None)) for name in names
    )
