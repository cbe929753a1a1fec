"""Distillation: the float model's answers as the target of the quantized one."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from halfstep.errors import TrainingError
from halfstep.fake_quantize import Mode
from halfstep.graph.inputs import ModelInputs, path_name
from halfstep.model import QuantizedModel
from halfstep.training.entry import Forward, entered

Measure = Literal["kl", "bernoulli", "mse"]

_WORDS: dict[Measure, str] = {
    "kl": "KL divergence of the softmax over axis {axis}",
    "bernoulli": "KL divergence of each number's sigmoid",
    "mse": "squared error, over the variance of the float model's,",
}

#: torch's losses, as functions and as modules, that tell what the outputs are.
_LOSSES: dict[Measure, tuple[Any, ...]] = {
    "kl": (F.cross_entropy, F.nll_loss, nn.CrossEntropyLoss, nn.NLLLoss),
    "bernoulli": (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
    "mse": (
        *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
        *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss),
    ),
}

_HINT = (
    "give hs.Distillation(axis=...) for logits of classes along that axis, hs.Distillation(measure='bernoulli') for "
    "logits of yes-or-no answers, or hs.Distillation(measure='mse') for numbers"
)


@dataclass(frozen=True)
class Distillation:
    """How far the quantized model's outputs are from the float model's, added to the loss, times ``weight``.

    ``"kl"``: ``T^2 KL(softmax(float / T) || softmax(quantized / T))`` of the classes along ``axis``; T^2 keeps
    gradients of the same size for every temperature. ``"bernoulli"``: the same of each number's sigmoid, for the logits
    of yes-or-no answers. ``"mse"``: the squared error over the variance that the float model's outputs have between the
    examples of the batch, for numbers of any unit. All are means over examples and positions; what the float model
    puts at -inf (masked classes) counts nothing.

    What is compared is the first floating-point tensor in the outputs that has a gradient, or those that
    ``Training(outputs=...)`` names, whose distances add up. What it is, is left to find out by default: torch's own
    losses tell, and labels: integers for all but one axis are classes along it, rows that sum to one are their
    probabilities. Else it is taken for numbers; without a loss, for logits of classes along the last axis of (batch,
    classes) and (batch, positions, classes), and axis 1 of maps. :class:`.Trained` says what was chosen, and a warning
    where the shape alone decided.

    It costs the float model's forward pass at every step.

    Attributes:
        weight: beside the user's loss, which has weight 1.
        temperature: above 1 the small logits count for more; not read by ``"mse"``.
        axis: of the classes; None finds it out.
        measure: ``"kl"``, ``"bernoulli"`` or ``"mse"``; None finds it out, and is ``"kl"`` where an axis is given.

    Raises:
        TrainingError: naming the option that cannot be.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network".
    """

    weight: float = 1.0
    temperature: float = 2.0
    axis: int | None = None
    measure: Measure | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TrainingError(f"Distillation: {name} is {value}, needed a number above 0")
        if self.measure not in (None, *_WORDS):
            known = ", ".join(map(repr, _WORDS))
            raise TrainingError(f"Distillation: measure is {self.measure!r}, needed {known} or None")
        if self.axis is not None and self.measure not in (None, "kl"):
            raise TrainingError(
                f"Distillation: axis is {self.axis} beside measure {self.measure!r}, which has none; leave one out"
            )

    def loss(self, outputs: Any, teacher_outputs: Any) -> Tensor:
        """How far ``outputs`` are from ``teacher_outputs``, with nothing but their shapes to tell what they are.

        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> Distillation().loss(logits, logits)
        tensor(0.)
        """
        return self.comparison(outputs).loss(outputs, teacher_outputs)

    def comparison(
        self,
        outputs: Any,
        loss: Callable[..., Any] | None = None,
        labels: Any = None,
        output: str | None = None,
    ) -> Comparison:
        """What is compared, found out from a first batch.

        Args:
            outputs: the model's.
            loss: the user's, which may tell what they are; None without one.
            labels: what it gets, which may tell too; not looked at without a loss.
            output: the name of the tensor among the outputs: its keys in their nest, ``"boxes"`` or ``"0"``; None for
                the first one of floats with a gradient.

        Raises:
            TrainingError: there is nothing to compare, no such output, or the axis asked for has no classes.
        """
        tensors = _tensors(outputs)
        place = None if output is None else _place(outputs, output)
        real = [index for index, tensor in enumerate(tensors) if tensor.is_floating_point()]
        if not real:
            raise TrainingError(
                f"distillation: the model's outputs ({type(outputs).__name__}) hold no floating-point tensor; train on "
                "a loss alone with distillation=None"
            )
        first = next((index for index in real if tensors[index].requires_grad), real[0])
        index = first if place is None else place
        shape = tensors[index].shape
        measure, axis, why, sure = self._choice(shape, loss, labels)
        size = ", ".join(["batch", *map(str, shape[1:])]) if len(shape) else "one number"
        where = f"output {index} of {len(tensors)}" if len(tensors) > 1 else "the output"
        where = where if output is None else f"output {output!r}"
        what = f"{_WORDS[measure].format(axis=axis)} of {where} ({size}), {why}"
        return Comparison(self, index, measure, axis, what, sure)

    def _choice(
        self, shape: torch.Size, loss: Callable[..., Any] | None, labels: Any
    ) -> tuple[Measure, int | None, str, bool]:
        """The measure, its axis, how they were known, and whether by more than the shape."""
        if self.axis is not None:
            return "kl", _checked_axis(self.axis, shape), "as asked for", True
        told = _told_by_loss(loss)
        labels = None if loss is None else labels
        axis = 1 if told == "kl" and len(shape) > 1 else _told_by_labels(shape, labels)
        if self.measure == "kl":
            return (
                "kl",
                _checked_axis(_usual_axis(shape) if axis is None else axis, shape),
                "as asked for",
                True,
            )
        if self.measure is not None:
            return self.measure, None, "as asked for", True
        if told in ("bernoulli", "mse"):
            return told, None, "as the loss tells", True
        if axis is not None and shape[axis] > 1:
            return "kl", axis, f"as the {'loss tells' if told else 'labels tell'}", True
        usual = _usual_axis(shape)
        if len(shape) < 2 or shape[usual] < 2:
            return "mse", None, "since one number is no choice of classes", True
        if loss is None:
            return "kl", usual, f"taken for logits of classes by its shape alone: {_HINT}", False
        if _are_numbers(shape, labels):
            return "mse", None, "as the labels tell", True
        return "mse", None, f"since neither the loss nor the labels tell what it is: {_HINT}", False


@dataclass(frozen=True)
class Comparison:
    """What a distillation compares, with nothing left to find out.

    Attributes:
        distillation: its options.
        index: of the output among the tensors of all outputs.
        measure: how they are compared.
        axis: of the classes; None without any.
        words: all of that, and how it was known.
        sure: whether by more than the shape.
    """

    distillation: Distillation
    index: int
    measure: Measure
    axis: int | None
    words: str
    sure: bool

    def loss(self, outputs: Any, teacher_outputs: Any) -> Tensor:
        """How far ``outputs`` are from ``teacher_outputs``: 0 where they are equal."""
        ours, theirs = (_tensors(answer)[self.index].float() for answer in (outputs, teacher_outputs))
        weight, temperature = self.distillation.weight, self.distillation.temperature
        if self.measure == "mse":
            return weight * _squared_error(ours, theirs)
        ours, theirs = ours / temperature, theirs / temperature
        if self.measure == "bernoulli":
            return weight * temperature**2 * _bernoulli_divergence(ours, theirs)
        assert self.axis is not None
        return weight * temperature**2 * _divergence(ours, theirs, self.axis)

    def __str__(self) -> str:
        return self.words


class Teacher:
    """The float model as it is now, and how far outputs are from its answers.

    Args:
        model: copied, so that it stays as it is.
        asked: how each output is compared, by name, None standing for the first one of floats; what is left open there
            is found out from the first batch.
        loss: the user's; None without one.
        forward: what is compared, as :func:`.entered` takes it.
    """

    def __init__(
        self,
        model: QuantizedModel,
        asked: Mapping[str | None, Distillation],
        loss: Callable[..., Any] | None,
        forward: Forward | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.set_mode(Mode.FLOAT)
        self.answers = entered(self.model, forward)
        self.asked, self.loss = asked, loss
        self.comparisons: tuple[Comparison, ...] = ()

    def distance(self, inputs: ModelInputs, outputs: Any, labels: Any) -> Tensor:
        """How far ``outputs`` are from the float model's answers to ``inputs``; a warning where that is a guess.

        Raises:
            TrainingError: there is nothing to compare, or, without a loss, nothing that trains.
        """
        with torch.no_grad():
            answers = self.answers(inputs)
        if not self.comparisons:
            self.comparisons = compared(self.asked, outputs, self.loss, labels)
            for comparison in self.comparisons:
                if not comparison.sure:
                    warnings.warn(f"distillation: {comparison}", stacklevel=2)
        distance = torch.stack([each.loss(outputs, answers) for each in self.comparisons]).sum()
        if self.loss is None:
            check_gradient(distance)
        return distance

    def state(self) -> list[dict[str, Any]]:
        """What was found out, as plain data; empty before the first batch."""
        return [
            {name: value for name, value in vars(comparison).items() if name != "distillation"}
            for comparison in self.comparisons
        ]

    def restore(self, state: list[dict[str, Any]] | dict[str, Any]) -> None:
        """Compare what another run compared; one comparison was kept by itself in earlier versions."""
        known = state if isinstance(state, list) else [state] if state else []
        options = self.asked.values()
        self.comparisons = tuple(
            Comparison(each, **kept) for each, kept in zip(options, known, strict=bool(known))
        )

    def __str__(self) -> str:
        return "; ".join(map(str, self.comparisons))


def compared(
    asked: Mapping[str | None, Distillation], outputs: Any, loss: Callable[..., Any] | None, labels: Any
) -> tuple[Comparison, ...]:
    """What is compared of each output asked for, None standing for the one that :class:`Distillation` finds.

    Raises:
        TrainingError: naming the output that is not there, or cannot be compared so.
    """
    return tuple(how.comparison(outputs, loss, labels, name) for name, how in asked.items())


def check_gradient(distance: Tensor) -> None:
    """Raise unless a training on distillation alone would train something.

    Raises:
        TrainingError: if it would not.
    """
    if not distance.requires_grad:
        raise TrainingError(
            "distillation has no gradient: no floating-point output of the model depends on what trains; give a loss"
        )


def _divergence(ours: Tensor, theirs: Tensor, axis: int) -> Tensor:
    """The mean of KL(softmax(theirs) || softmax(ours)) along an axis, in nats."""
    ours, theirs = ours.log_softmax(axis), theirs.log_softmax(axis)
    never = theirs == -math.inf  # 0 log 0 is 0, not NaN
    apart = theirs.exp() * (theirs - torch.where(never, 0.0, ours))
    return torch.where(never, 0.0, apart).sum(axis).mean()


def _bernoulli_divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """The mean of KL(Bernoulli(sigmoid(theirs)) || Bernoulli(sigmoid(ours))), in nats."""
    never = theirs == -math.inf
    ours, theirs = torch.where(never, 0.0, ours), torch.where(never, 0.0, theirs)
    return (theirs.sigmoid() * (theirs - ours) + F.softplus(ours) - F.softplus(theirs)).mean()


def _squared_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """The mean squared error over the variance between examples; over the mean square where there is none."""
    never = theirs == -math.inf
    ours, theirs = torch.where(never, 0.0, ours), torch.where(never, 0.0, theirs)
    variance = theirs.var(0, correction=0).mean() if theirs.dim() else theirs.new_zeros(())
    power = theirs.square().mean()
    return (ours - theirs).square().mean() / torch.where(
        variance > 0, variance, torch.where(power > 0, power, 1.0)
    )


def _told_by_loss(loss: Callable[..., Any] | None) -> Measure | None:
    """What one of torch's losses says of the outputs; None of any other."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    for measure, known in _LOSSES.items():
        if any(loss is each or (isinstance(each, type) and isinstance(loss, each)) for each in known):
            return measure
    return None


def _told_by_labels(shape: torch.Size, labels: Any) -> int | None:
    """The axis of the classes that labels are indices or probabilities of; None if they are neither."""
    found = _tensors(labels)
    if len(found) != 1 or len(shape) < 2:
        return None
    (label,), usual = found, _usual_axis(shape)
    if label.is_floating_point() and label.shape == shape and shape[usual] > 1:
        sums = label.sum(usual)
        return (
            usual
            if bool((label >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
            else None
        )
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        return None
    axes = [
        axis
        for axis in range(1, len(shape))
        if shape[axis] > 1 and label.shape == (*shape[:axis], *shape[axis + 1 :])
    ]
    return usual if usual in axes else next(iter(axes), None)


def _are_numbers(shape: torch.Size, labels: Any) -> bool:
    """Whether labels are floats in the shape of the outputs."""
    found = _tensors(labels)
    return len(found) == 1 and found[0].is_floating_point() and found[0].shape == shape


def _usual_axis(shape: torch.Size) -> int:
    """Where the classes usually are: last in (batch, classes) and (batch, positions, classes), 1 in maps."""
    return len(shape) - 1 if len(shape) < 4 else 1


def _checked_axis(axis: int, shape: torch.Size) -> int:
    """An axis of classes, counted from the front.

    Raises:
        TrainingError: if it is none: out of range, the batch's, or of one entry.
    """
    size = ", ".join(["batch", *map(str, shape[1:])])
    if not (-len(shape) < axis < len(shape) and axis % len(shape)):
        raise TrainingError(
            f"Distillation: there are no classes along axis {axis} of the output ({size}), needed one of the axes "
            f"after the batch's; {_HINT}"
        )
    axis %= len(shape)
    if shape[axis] < 2:
        raise TrainingError(
            f"Distillation: axis {axis} of the output ({size}) has one entry, whose softmax is always 1: nothing would "
            f"be trained; {_HINT}"
        )
    return axis


def _place(outputs: Any, name: str) -> int:
    """The place of a tensor among all of the outputs.

    Raises:
        TrainingError: if there is none of floats of that name.
    """
    leaves = pytree.tree_flatten_with_path(outputs)[0]
    named = [(path_name(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
    for index, (known, leaf) in enumerate(named):
        if known == name and leaf.is_floating_point():
            return index
    floats = ", ".join(repr(known) for known, leaf in named if leaf.is_floating_point())
    raise TrainingError(f"Training: outputs has {name!r}, needed one of what the model answers: {floats}")


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
