"""The examples that a block is learned on: what it reads in both networks, and what it is to make of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn.functional import kl_div

from halfstep.fidelity.replay import Values
from halfstep.graph.shapes import varies
from halfstep.model import QuantizedModel
from halfstep.repair.walk import BlockRun

#: Examples that are run at once where nothing is learned.
TOGETHER = 128


@dataclass(frozen=True)
class Shown:
    """Some examples of a block, by the nodes that make them.

    Attributes:
        float_inputs: what it reads in the float network.
        inputs: the same in the quantized one.
        targets: its outputs in the float network.
        weights: of the squared errors of these; a node without one counts all elements alike.
    """

    float_inputs: Values
    inputs: Values
    targets: Values
    weights: Values


class BlockExamples:
    """All examples of a block: joined if their shapes allow it, else batch by batch.

    Args:
        model: its graph says which dimension of a value is the batch.
        run: the block's.
        weights: of errors of the outputs, for each batch, by node; empty for none. Their mean is made 1.
        together: examples that are run at once at most.
        logits: the output that holds logits of classes, (..., classes): the loss is then its divergence; None where
            errors are squared.
    """

    def __init__(
        self,
        model: QuantizedModel,
        run: BlockRun,
        weights: Sequence[Values],
        together: int = TOGETHER,
        logits: fx.Node | None = None,
    ) -> None:
        self.together, self._logits = together, logits
        self.outputs = run.block.outputs
        nodes = (*run.block.entries, *self.outputs)
        self._axes = {node: model.captured.batch_axis(node) for node in nodes}
        # Where a product of the batch and other sizes is a dimension, examples cannot be picked out.
        self._divisible = all(
            self._axes[node] is not None or not any(map(varies, getattr(node.meta.get("val"), "shape", ())))
            for node in nodes
        )
        own = [{node: each[node] for node in self.outputs if node in each} for each in weights]
        parts = [Shown(*each) for each in zip(run.float_inputs, run.inputs, run.targets, own, strict=True)]
        parts = [self._joined(parts)] if self._divisible and self._alike(parts) else parts
        if any(layer.operator.kind == "conv" for layer in run.block.layers):
            parts = [_channels_last(part) for part in parts]
        self._parts = parts
        self._sizes = torch.tensor([self._size(part) for part in self._parts])
        self._level(run.block.outputs)
        #: What reads otherwise in the quantized network: only that can be mixed with the float one's.
        self.differing = [
            node
            for node in run.block.entries
            if any(_differ(part.inputs[node], part.float_inputs[node]) for part in self._parts)
        ]

    def draw(self, count: int, generator: torch.Generator) -> Shown:
        """Random examples, with replacement; a whole batch where they cannot be picked out."""
        place = int(torch.multinomial(self._sizes.double(), 1, generator=generator))
        if not self._divisible:
            return self._parts[place]
        size = int(self._sizes[place])
        return self._taken(self._parts[place], torch.randint(size, (min(count, size),), generator=generator))

    def all(self) -> Iterator[Shown]:
        """Every example once, some at a time."""
        for part, size in zip(self._parts, self._sizes.tolist(), strict=True):
            if self._divisible:
                for index in torch.arange(size).split(self.together):
                    yield self._taken(part, index)
            else:
                yield part

    def loss(self, shown: Shown, values: Values) -> Tensor:
        """The squared error of the outputs over their mean square, weighted, in the mean over the outputs.

        Of logits the divergence of the classes' probabilities from the float network's, in nats.
        """
        if self._logits is not None:
            wanted, got = (each[self._logits].log_softmax(-1) for each in (shown.targets, values))
            sum_ = kl_div(got, wanted, reduction="sum", log_target=True)
            divergence: Tensor = sum_ / max(1, got[..., 0].numel())
            return divergence
        errors = []
        for node in self.outputs:
            error = (values[node] - shown.targets[node]).square()
            if node in shown.weights:
                error = error * shown.weights[node].to(error.dtype)
            errors.append(error.mean() / self._power[node])
        return torch.stack(errors).mean()

    def count(self, shown: Shown) -> int:
        """How many examples they are."""
        return self._size(shown)

    # putting together and taking apart

    def _alike(self, parts: Sequence[Shown]) -> bool:
        """Whether the values of all batches have the same shapes, but for how many examples there are."""

        def shapes(part: Shown) -> list[tuple[int, ...]]:
            found = []
            for node, value in {**part.inputs, **part.targets}.items():
                shape = list(getattr(value, "shape", ()))
                if (axis := self._axes[node]) is not None:
                    shape[axis] = 0
                found.append(tuple(shape))
            return found

        return all(
            shapes(part) == shapes(parts[0]) and part.weights.keys() == parts[0].weights.keys()
            for part in parts
        )

    def _joined(self, parts: Sequence[Shown]) -> Shown:
        def join(values: Sequence[Values]) -> Values:
            return {
                node: values[0][node]
                if (axis := self._axes[node]) is None
                else torch.cat([v[node] for v in values], axis)
                for node in values[0]
            }

        sides = ("float_inputs", "inputs", "targets", "weights")
        return Shown(*(join([getattr(part, side) for part in parts]) for side in sides))

    def _taken(self, shown: Shown, index: Tensor) -> Shown:
        def take(values: Values) -> Values:
            return {
                node: value if (axis := self._axes[node]) is None else _picked(value, axis, index)
                for node, value in values.items()
            }

        return Shown(
            *(take(side) for side in (shown.float_inputs, shown.inputs, shown.targets, shown.weights))
        )

    def _size(self, shown: Shown) -> int:
        values = {**shown.targets, **shown.inputs}
        return next(
            (value.shape[axis] for n, value in values.items() if (axis := self._axes[n]) is not None), 1
        )

    def _level(self, outputs: Sequence[fx.Node]) -> None:
        """Make the weights' mean 1, and find each output's mean square under them."""
        self._power: dict[fx.Node, float] = {}
        for node in outputs:
            total = count = power = 0.0
            for part in self._parts:
                squares, weight = part.targets[node].double().square(), part.weights.get(node)
                total += squares.numel() if weight is None else float(weight.double().sum())
                count += squares.numel()
                power += float((squares if weight is None else squares * weight.double()).sum())
            mean = total / max(count, 1)
            for part in self._parts:
                if node in part.weights:
                    if mean > 0:
                        part.weights[node] /= mean
                    else:  # nothing feels it
                        part.weights.pop(node)
            self._power[node] = power / max(total, 1e-300) or 1.0


def _channels_last(shown: Shown) -> Shown:
    """The same with images in the order of memory in which convs, depthwise ones above all, take less time."""

    def laid_out(values: Values) -> Values:
        return {
            node: value.contiguous(memory_format=torch.channels_last)
            if isinstance(value, Tensor) and value.dim() == 4
            else value
            for node, value in values.items()
        }

    return Shown(*map(laid_out, (shown.float_inputs, shown.inputs, shown.targets, shown.weights)))


def _picked(value: Tensor, axis: int, index: Tensor) -> Tensor:
    """``value.index_select(axis, index)`` in the same order of memory, which torch gives up at four times the cost."""
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    picked = value.permute(order).index_select(order.index(axis), index.to(value.device))
    return picked.permute([order.index(each) for each in range(value.dim())])


def _differ(a: object, b: object) -> bool:
    """Whether two values are floats that are not all equal."""
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point()
    return tensors and not torch.equal(a, b)  # type: ignore[arg-type]
