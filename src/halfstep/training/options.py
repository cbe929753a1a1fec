"""What a training does, as frozen records of options."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from halfstep.errors import TrainingError
from halfstep.graph.float32 import AUTOCAST
from halfstep.graph.inputs import ModelInputs
from halfstep.identity import Identity
from halfstep.training.distillation import Distillation
from halfstep.training.entry import Forward
from halfstep.training.oscillation import Damping, Freezing
from halfstep.training.ranges import Ranges

Labelled = Iterable[tuple[ModelInputs, Any]]
Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Optimizer:
    """An optimizer that can be asked for by name.

    Attributes:
        make: from parameter groups, which bring their learning rates.
        gentle_rate: what suits 8 bits: about 1% of a usual rate for training from nothing.
    """

    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    gentle_rate: float


OPTIMIZERS = {
    "adamw": Optimizer(lambda groups: torch.optim.AdamW(groups, lr=0.0), 1e-4),
    "sgd": Optimizer(lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True), 1e-3),
}

#: How many times the gentle rate few bits want: their weights have to cross whole steps, not parts of one.
FEW_BITS_FACTOR = 20.0


@dataclass(frozen=True)
class Training:
    """The options of a fine-tuning; every default is what the usual case wants.

    Attributes:
        labelled: iterable of ``(inputs, labels)`` batches, iterated once an epoch; it brings its own shuffling and
            augmentation. A generator, which can be iterated only once, is kept as a list. With ``loss=None`` labels
            are not looked at and may be None.
        loss: ``loss(outputs, labels)`` -> a scalar tensor; None trains on distillation alone.
        epochs: passes over ``labelled``; 0.25 is a quarter of one. About a tenth of the original training's.
        learning_rate: at the start; None for :func:`default_rate` of the model's fewest bits. About 1% of the original
            training's suits 8 bits, and 10% or more 4 bits and below.
        final_rate: the share of it that the cosine schedule ends at.
        optimizer: ``"adamw"`` or ``"sgd"``.
        weight_decay: of the weights; ranges and one-dimensional parameters have none.
        clip_norm: gradients are scaled down to this norm where theirs is larger; None leaves them.
        distillation: from the float model, by what suits the outputs; None trains on ``loss`` alone.
        forward: what is trained, where that is not what the model answers with: the name of a method of the user's
            module, or a function of the module and its inputs, such as the raw heads of a detector that answers with
            boxes. It is traced once and runs the same layers through the same quantizers; ``loss`` and distillation get
            what it returns, in evaluation mode but for flags that it sets itself. What it computes beside the model's
            own layers stays in float; other layers are refused by name.
        outputs: what distillation compares of several outputs: their names (keys, or numbers in a tuple), each compared
            as ``distillation`` says, or a dict from names to a :class:`Distillation` each, whose distances add up. None
            for the first output of floats.
        ranges: which ranges move, and when.
        oscillation: what keeps weights of 4 bits and fewer from jumping to and fro between two codes, ``Damping()`` or
            ``Freezing()``; None leaves them.
        autocast: a dtype, say ``torch.bfloat16``, for torch's automatic mixed precision; None computes in the
            model's own. With ``torch.float16`` the loss is scaled, and a step whose gradients overflow is skipped.
        evaluate_every: epochs between two scores on the metric, for the early stop and the best checkpoint.
        checkpoint_every: steps between two checkpoints.
        control: also fine-tune the float model in the same way and score it, since training alone lifts a model too.
        seed: of torch, numpy and Python, set anew for each epoch.

    Raises:
        TrainingError: naming the option that cannot be.

    Source of the schedule: Wu et al. 2020, "Integer Quantization for Deep Learning Inference", section 5.
    """

    #: On several ranks of a run each has its own.
    known_by_name: ClassVar[bool] = True

    labelled: Labelled
    loss: Loss | None = None
    epochs: float = 1.0
    learning_rate: float | None = None
    final_rate: float = 0.01
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip_norm: float | None = None
    distillation: Distillation | None = field(default_factory=Distillation)
    forward: Forward | None = None
    outputs: Sequence[str | int] | Mapping[str | int, Distillation] | None = None
    ranges: Ranges = field(default_factory=Ranges)
    oscillation: Damping | Freezing | None = None
    autocast: torch.dtype | None = None
    evaluate_every: float = 0.5
    checkpoint_every: int = 100
    control: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.labelled, Iterator):
            object.__setattr__(self, "labelled", list(self.labelled))
        if self.loss is None and self.distillation is None:
            raise TrainingError(
                "Training: got neither a loss nor distillation; give loss=..., such as "
                "torch.nn.functional.cross_entropy"
            )
        if self.forward is not None and not (isinstance(self.forward, str) or callable(self.forward)):
            raise TrainingError(
                f"Training: forward is {self.forward!r}, needed the name of a method, or a function of the model and "
                "its inputs"
            )
        self.distilled()
        if self.optimizer not in OPTIMIZERS:
            raise TrainingError(
                f"Training: optimizer is {self.optimizer!r}, needed one of {', '.join(map(repr, OPTIMIZERS))}"
            )
        for name in ("epochs", "evaluate_every", "checkpoint_every"):
            check_positive(name, getattr(self, name))
        if not 0 <= self.final_rate <= 1:
            raise TrainingError(f"Training: final_rate is {self.final_rate}, needed 0 to 1")
        if self.autocast not in AUTOCAST:
            raise TrainingError(
                f"Training: autocast is {self.autocast!r}, needed torch.bfloat16, torch.float16 or None"
            )
        for name in ("learning_rate", "clip_norm"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))

    def distilled(self) -> dict[str | None, Distillation]:
        """How each output is compared, by name; None stands for the first one of floats. Empty without distillation.

        Raises:
            TrainingError: if ``outputs`` are no names, or stand beside ``distillation=None``.
        """
        asked = self.outputs
        if asked is None:
            return {} if self.distillation is None else {None: self.distillation}
        if isinstance(asked, str) or not asked or not all(isinstance(name, (str, int)) for name in asked):
            raise TrainingError(
                f"Training: outputs is {asked!r}, needed names of outputs such as ['scores', 'boxes'], or a dict from "
                "names to hs.Distillation(...)"
            )
        how = asked.values() if isinstance(asked, Mapping) else [self.distillation] * len(asked)
        found = {str(name): each for name, each in zip(asked, how, strict=True)}
        if not all(isinstance(each, Distillation) for each in found.values()):
            raise TrainingError(
                f"Training: outputs is {asked!r}, needed hs.Distillation(...) for each name; distillation is "
                f"{self.distillation!r}"
            )
        return {name: each for name, each in found.items() if each is not None}

    def rate(self, step: int, steps: int) -> float:
        """The share of the learning rate at ``step`` of ``steps``: a cosine from 1 to ``final_rate``.

        >>> Training([], final_rate=0.0).rate(50, 100)
        0.5
        """
        return self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * step / steps)) / 2

    def describe(self) -> dict[str, str]:
        """The options that decide about the result, in words: all but the data and the functions."""
        return {
            option.name: repr(getattr(self, option.name))
            for option in fields(self)
            if option.name not in ("labelled", "loss", "control", "checkpoint_every", "forward")
            and (option.name != "outputs" or self.outputs is not None)
        }

    def identity(self) -> Identity:
        """The content of the options that decide about the result, of the loss, and of the data."""
        entry = () if self.forward is None else (self.forward,)
        return Identity(self.describe(), self.loss, self.labelled, *entry)


def check_training(training: Any) -> None:
    """Raise unless ``training`` is a :class:`Training`.

    Raises:
        TrainingError: saying what it is.
    """
    if not isinstance(training, Training):
        raise TrainingError(
            f"training: got {type(training).__name__}, needed hs.Training(labelled, loss) with its options"
        )


def default_rate(bits: int, optimizer: str) -> float:
    """The learning rate at the start for a model whose fewest bits at any site are ``bits``.

    AdamW: 1e-4 for 7 bits and more, which hardly need training; below, geometrically up to 2e-3 for 4 and fewer. SGD:
    ten times as much.

    >>> default_rate(7, "adamw"), default_rate(2, "adamw"), round(default_rate(6, "adamw"), 6)
    (0.0001, 0.002, 0.000447)
    """
    few = 0.0 if bits >= 7 else min((8 - bits) / 4, 1.0)
    return OPTIMIZERS[optimizer].gentle_rate * math.pow(FEW_BITS_FACTOR, few)


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number above 0.

    Raises:
        TrainingError: naming the option.
    """
    if not (math.isfinite(value) and value > 0):
        raise TrainingError(f"Training: {name} is {value}, needed a number above 0")
