"""How batches go through a model: in pieces of the fastest size, and side by side.

Batches in pieces of the size that a network runs fastest at, where its answers do not depend on that.

A layer's output for a large batch is memory that the operating system hands over page by page; small ones stay in the
caches. Pieces are computed side by side. Which size is best depends on the network and the machine, so it is measured
on the first batches.

Batches through a model side by side, as many as memory has room for.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from halfstep.bias_shift import BiasShift
from halfstep.cores import side_by_side
from halfstep.evaluate import DataMetric, Scorer, parts
from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.graph.inputs import ModelInputs, tensors_of
from halfstep.graph.shapes import Axes, hint, varies
from halfstep.model import QuantizedModel, run

#: Sizes that are tried beside a piece for each thread, the smallest on the first batch.
SIZES = (256, 128, 64)


#: Pieces that take less than this share of a whole batch's time need no comparison with others.
CLEARLY = 0.5


class _Cut(NamedTuple):
    """How a batch is cut: examples a piece, and how many pieces run at once; None for as many as there are threads."""

    size: int
    workers: int | None = 1


@dataclass
class _Shown:
    """A cut that gave the whole answer to batches of some shapes, and what sites and layers did then.

    Attributes:
        cut: the fastest that was found.
        doing: names of sites and what they did, and of layers that read floats: each was seen to make no difference.
    """

    cut: _Cut
    doing: set[tuple[str, Mode]]


@dataclass
class _Findings:
    """How a model is cut.

    Attributes:
        cuts: by what runs, shapes, modes and layers in float.
        tried: one that gave the whole answer, and seconds without it.
        shown: by shapes alone.
    """

    cuts: dict[object, _Cut] = field(default_factory=dict)
    tried: dict[object, tuple[_Cut, float]] = field(default_factory=dict)
    shown: dict[object, _Shown] = field(default_factory=dict)


#: What was found out about each model: its float network runs first, then what it is simulated as.
_findings: WeakKeyDictionary[QuantizedModel, _Findings] = WeakKeyDictionary()


class InPieces(nn.Module):
    """A model that takes batches as they are, runs them in pieces where that is faster, and returns whole answers.

    The first batch of a shape runs in pieces of one size and whole. They are used from then on if they are clearly
    faster; else the second batch runs in pieces of other sizes too. A size is used only if its answer is equal to the
    last bit, side by side or, where that makes a difference, one after the other. A batch runs whole once: where
    another process keeps a core busy, that may take as long as a hundred in pieces. What was found holds for the same
    shapes and the same model, whatever its layers in float, as long as each site and layer does what it did then:
    kernels, and with them the order of sums, are chosen by what a layer reads and not by values. Where one does not
    (the first candidate quantizes), a single batch shows whether the size that is known gives the whole answer.

    Weights and biases are quantized once a batch, not once a piece.

    Args:
        model: what runs.
    """

    #: Other ranks of a run make their own of the model that they have.
    known_by_name = False

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__()
        self.model = model
        self._found = _findings.setdefault(model, _Findings())

    def __reduce__(self) -> tuple[Any, ...]:
        """As on another rank: the one that goes on finding out there how its model is fastest."""
        return in_pieces, (self.model,)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a metric's function asks of a model is the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for the same arguments."""
        inputs, found = kwargs or args, self._found
        sizes = _sizes(self._size(inputs))
        if not sizes:
            return run(self.model, inputs)
        shapes, doing = self._shapes(inputs), self._doing()
        kind = repr((shapes, sorted((name, mode.value) for name, mode in doing), self.model.precision))
        shown = found.shown.get(shapes)
        if kind not in found.cuts and shown is not None and doing <= shown.doing:
            found.cuts[kind] = shown.cut
        if kind in found.cuts:
            return self._in_pieces(inputs, found.cuts[kind])
        cut: _Cut | None
        if kind in found.tried:
            answer, cut = self._find(inputs, sizes, *found.tried.pop(kind))
        else:
            known = None if shown is None or shown.cut.size >= self._size(inputs) else shown.cut
            answer, cut = self._compare(kind, inputs, sizes, known)
        if cut is not None:
            found.cuts[kind] = cut
            # What runs whole has shown nothing: it may be for the time, or for the answer.
            if cut.size < self._size(inputs):
                if shown is None:
                    found.shown[shapes] = _Shown(cut, doing)
                elif cut == shown.cut:
                    shown.doing |= doing
        return answer

    def _shapes(self, inputs: Any) -> object:
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors_of(inputs)]
        return repr((shapes, torch.get_num_threads()))

    def _doing(self) -> set[tuple[str, Mode]]:
        """What sites do now, and which layers read floats, be it that they have no sites."""
        modes = {name: site.mode for name, site in self.model.sites.items()}
        floating = [
            layer.name for layer in self.model.layers if {modes[n] for n in layer.sites} <= {Mode.FLOAT}
        ]
        return {(name, mode) for name, mode in modes.items() if mode is not Mode.FLOAT} | {
            (name, Mode.FLOAT) for name in floating
        }

    def _compare(
        self, kind: object, inputs: Any, sizes: Sequence[int], known: _Cut | None
    ) -> tuple[Any, _Cut | None]:
        """The whole answer to the first batch, after the same in pieces; with the cut where that is clear by then.

        Args:
            kind: of what runs.
            inputs: the batch.
            sizes: to be tried, descending; now the last of them.
            known: tried instead, and not compared with other sizes, where it was the best before.
        """
        whole, cut = _Cut(self._size(inputs)), known or _Cut(sizes[-1], self._workers())
        pieces, least = _timed(lambda: self._in_pieces(inputs, cut))
        answer, seconds = _timed(lambda: run(self.model, inputs))
        if cut.workers != 1 and pieces is not None and not _equal(answer, pieces):
            # Operators may add up in another order where several threads share them.
            cut = _Cut(cut.size)
            pieces, least = _timed(lambda: self._in_pieces(inputs, cut))
        if pieces is None or not _equal(answer, pieces):
            return answer, whole
        if known is not None:
            return answer, cut
        if least < CLEARLY * seconds or len(sizes) == 1:
            return answer, cut if least <= seconds else whole
        self._found.tried[kind] = cut, seconds
        return answer, None

    def _find(self, inputs: Any, sizes: Sequence[int], cut: _Cut, seconds: float) -> tuple[Any, _Cut]:
        """The answer to the second batch, and the cut that gives it in the least time.

        No smaller size is tried behind one that is slower than the one before.

        Args:
            inputs: the batch.
            sizes: to be tried, descending.
            cut: of the last of them, which gave the whole answer.
            seconds: that a whole batch took.
        """
        answer, least = _timed(lambda: self._in_pieces(inputs, cut))
        best, before = cut, math.inf
        for size in sizes[:-1]:
            other = cut._replace(size=size)
            pieces, took = _timed(lambda other=other: self._in_pieces(inputs, other))  # type: ignore[misc]
            if took < least and _equal(answer, pieces):
                best, least = other, took
            if took > before:
                break
            before = took
        return answer, best if least <= seconds else _Cut(self._size(inputs))

    def _size(self, inputs: Any) -> int:
        return self.model.captured.batch_size(inputs)

    def _workers(self) -> int | None:
        """How many pieces run at once: one on an accelerator, which is shared anyway."""
        return None if self.model.device.type == "cpu" else 1

    def _in_pieces(self, inputs: Any, cut: _Cut) -> Any:
        """The answer put together from pieces; None if something in it does not belong to single examples."""
        count, (size, workers) = self._size(inputs), cut
        if size >= count:
            return run(self.model, inputs)
        starts = range(0, count, size)
        parts = (self.model.captured.examples(inputs, start, min(count, start + size)) for start in starts)
        with parameters_once(self.model):
            each = list(side_by_side(lambda part: run(self.model, part), parts, workers))
        leaves = [pytree.tree_leaves(answer) for answer in each]
        axes = [axis or 0 for axis in self.model.captured.output_axes]
        for start, some in zip(starts, leaves, strict=True):
            rows = min(size, count - start)
            if len(some) != len(axes) or not all(
                isinstance(leaf, torch.Tensor) and leaf.dim() > axis and leaf.shape[axis] == rows
                for leaf, axis in zip(some, axes, strict=True)
            ):
                return None
        joined = [
            torch.cat(column, axis) for column, axis in zip(zip(*leaves, strict=True), axes, strict=True)
        ]
        return pytree.tree_unflatten(joined, pytree.tree_structure(each[0]))


#: Quantized weights that are held while a batch runs in pieces; of a network with larger ones each piece makes its own.
HELD_WEIGHTS = 256 * 2**20


@contextmanager
def parameters_once(model: QuantizedModel) -> Iterator[None]:
    """Quantize weights and biases once for all that ``model`` runs in the block, which must not change them.

    With gradients each run does so by itself, since they lead back through it.
    """
    holders: list[tuple[FakeQuantize | BiasShift, torch.Tensor]] = [
        (model.sites[site.name], model.weight(site.name)) for site in model.placement.sites if site.is_weight
    ]
    for layer in model.layers:
        shift, bias = model.shifts.get(layer.name), layer.operator.bias
        if shift is not None and bias is not None:
            holders.append((shift, model.weight(str(bias.target))))
    if torch.is_grad_enabled() or sum(parameter.nbytes for _, parameter in holders) > HELD_WEIGHTS:
        yield
        return
    try:
        for holder, parameter in holders:
            holder.hold(parameter)
        yield
    finally:
        for holder, _ in holders:
            holder.held = None


def _sizes(count: int) -> list[int]:
    """The sizes to try for a batch: the one that gives each thread a piece, and smaller ones, descending; two at least.

    >>> _sizes(1)
    []
    """
    share = min(-(-count // torch.get_num_threads()), (count + 1) // 2)
    return [size for size in (share, *(size for size in SIZES if size < share)) if size > 1]


@functools.lru_cache(maxsize=1)
def in_pieces(model: QuantizedModel) -> InPieces:
    """The model in pieces, the same again for the same model."""
    return InPieces(model)


def scored(model: QuantizedModel, scorer: Scorer) -> nn.Module:
    """What a metric scores instead of ``model``: itself, in pieces where the metric sees no more than the answers."""
    plain = all(isinstance(part, DataMetric) and part.plain for part in parts(scorer).values())
    return InPieces(model) if plain else model


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _equal(whole: Any, pieces: Any) -> bool:
    """Whether two answers are the same to the last bit; NaN equals nothing."""
    (one, kind), (other, same) = pytree.tree_flatten(whole), pytree.tree_flatten(pieces)
    return kind == same and all(
        isinstance(a, torch.Tensor) and torch.equal(a, b) and a.stride() == b.stride()
        for a, b in zip(one, other, strict=True)
    )


Result = TypeVar("Result")

#: Activations that batches which run at once may hold together, beside the first one's.
HELD_BYTES = 512 * 2**20


#: Of the largest activation so many are alive at a time: what an operator reads and writes, and what a skip keeps.
ALIVE = 4


def abreast(
    model: QuantizedModel,
    work: Callable[[int, ModelInputs], Result],
    batches: Iterable[ModelInputs],
    ordered: bool = False,
) -> Iterator[Result]:
    """What ``work`` makes of each batch and its number, in order.

    Args:
        model: what ``work`` runs; on an accelerator, which is shared anyway, one batch runs at a time.
        work: may be called from several threads at once.
        batches: taken as they are needed; a batch may be taken before ``work`` has ended with the ones before.
        ordered: one batch at a time, for what depends on the order.
    """
    numbered = enumerate(batches)
    first = next(numbered, None)
    if first is None:
        return
    workers = 1 if ordered else _room(model, model.captured.batch_size(first[1]))
    yield from side_by_side(lambda item: work(*item), itertools.chain([first], numbered), workers)


def _room(model: QuantizedModel, size: int) -> int:
    """How many batches of ``size`` may run at once."""
    if model.device.type != "cpu":
        return 1
    largest = max((example_bytes(node, model.captured.axes) for node in model.graph.nodes), default=0)
    return 1 + HELD_BYTES // max(1, ALIVE * largest * size)


def example_bytes(node: fx.Node, axes: Axes) -> int:
    """Bytes of a node's value for one example, with what varies beside the batch as large as in the traced example."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    batch = axes.batch_axis(value)
    if batch is None and value.dim() and varies(value.shape[0]):  # a product of the batch and other sizes
        batch = 0
    return (
        math.prod(hint(size) for axis, size in enumerate(value.shape) if axis != batch) * value.element_size()
    )
