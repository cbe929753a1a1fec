"""The training loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfstep.distributed import share, together
from halfstep.errors import DivergedError, FormatError, named
from halfstep.fake_quantize import Mode
from halfstep.graph.inputs import ModelInputs, move
from halfstep.identity import Identity
from halfstep.model import QuantizedModel
from halfstep.progress import steps
from halfstep.training.averaging import Averaging
from halfstep.training.batches import (
    Batches,
    check_dependence,
    first_bad_gradient,
    first_bad_value,
    outputs_loss,
)
from halfstep.training.check import trainable
from halfstep.training.checkpoint import (
    FILE,
    Checkpoint,
    Tensors,
    fingerprint,
    optimizer_tensors,
    own_randomness,
    random_state,
    restore_optimizer,
    restore_random_state,
)
from halfstep.training.distillation import Teacher
from halfstep.training.entry import entered
from halfstep.training.options import OPTIMIZERS, Training, default_rate
from halfstep.training.ranges import MovingRanges
from halfstep.training.trained import Judge, Judgement, Mark, Trained


def fit(
    model: QuantizedModel,
    training: Training,
    judge: Judge | None = None,
    directory: Path | None = None,
    stop: Callable[[], bool] | None = None,
) -> Trained:
    """Train ``model`` in place, and leave it as the best that the judge saw.

    A model that quantizes is trained through its quantizers; one that passes floats is trained as the float model
    that it is, which is the float control.

    On several ranks of a run each takes a part of every batch, see :class:`.Averaging`; rank 0 judges and writes.

    Args:
        model: calibrated.
        training: what to do.
        judge: asked before the first step, at every ``evaluate_every`` and after the last step; without one the last
            state is kept.
        directory: for the checkpoint; a training that was interrupted goes on from there. None keeps none.
        stop: asked before every step; once it says so the training ends after what was trained is judged and kept,
            and can go on from there. None never stops it.

    Raises:
        TrainingError: if nothing can be trained, or the loss cannot be used.
        DivergedError: if loss or gradients became NaN or infinite, with the step and what went first; the model is
            back at its last good state.
        DataError: if the batches cannot be used.
        RunError: if the checkpoint cannot be written, or is another training's.
    """
    return together(_fitted, model, training, _Rank0(judge, directory, stop), judge is not None)


def _fitted(model: QuantizedModel, training: Training, rank0: _Rank0, judged: bool) -> Trained:
    mine = share()
    mine.spoil()
    judge = rank0.judge if mine.leads else _nobody if judged else None
    try:
        with own_randomness():
            return _Fit(model, training, judge, rank0.directory, rank0.stop or (lambda: False)).run()
    finally:
        mine.spoil()


@dataclass(frozen=True)
class _Rank0:
    """What only rank 0 of a run has."""

    judge: Judge | None = None
    directory: Path | None = None
    stop: Callable[[], bool] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Rank0, ()


def _nobody(step: int) -> Judgement:
    raise AssertionError("rank 0 judges")


class _Fit:
    def __init__(
        self,
        model: QuantizedModel,
        training: Training,
        judge: Judge | None,
        directory: Path | None,
        stop: Callable[[], bool],
    ) -> None:
        self.rate = learning_rate(training, model)
        training = replace(training, learning_rate=self.rate)  # the one that decides about the result
        self.model, self.training, self.judge, self.stop = model, training, judge, stop
        self.device = next(model.parameters()).device if list(model.parameters()) else torch.device("cpu")
        weights = trainable(model)
        self.share = share()
        self.averaging = Averaging(self.share, model)
        self.batches = Batches(training)
        self.share.same(
            "batches of training data:", self.batches.count, "give every rank the same data, all of them"
        )
        self.planned = max(1, round(training.epochs * self.batches.count))
        self.every = max(1, round(training.evaluate_every * self.batches.count))
        self.path = directory / FILE if directory is not None else None
        self.fingerprint = fingerprint(model.state_dict(), training) if self.path else ""
        self.enter = entered(model, training.forward)
        asked = training.distilled()
        self.teacher = Teacher(model, asked, training.loss, training.forward) if asked else None
        quantized = model.mode is Mode.QUANTIZE
        self.ranges = MovingRanges(model, training.ranges) if quantized else None
        keeping = training.oscillation if quantized else None
        self.keeper = keeping.start(model) if keeping is not None else None
        self.move_at = math.ceil(training.ranges.after * self.planned)
        self.optimizer = OPTIMIZERS[training.optimizer].make(self._groups(weights))
        # Gradients in float16 vanish below 6e-8: the loss is scaled up, as far as they do not overflow.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.autocast is torch.float16)
        self.step = self.resumed_at = self.skipped = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.marks: list[Mark] = []
        self.enough = False
        self.best_step = 0
        self.random: Tensors = {}
        self.batch: tuple[Any, ...] = ()  # the last one that was trained on
        self.last_batch = ""  # of the run before, as a digest
        self.good = self._state()  # of the best mark; without a judge of the last checkpoint

    def _groups(self, weights: list[nn.Parameter]) -> list[dict[str, Any]]:
        rate, decay = self.rate, self.training.weight_decay
        moving = self.ranges.parameters if self.ranges is not None else []
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "base": rate, "weight_decay": decay},
            {"params": [p for p in weights if p.dim() <= 1], "base": rate, "weight_decay": 0.0},
            {"params": moving, "base": rate * self.training.ranges.rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def run(self) -> Trained:
        try:
            self._resume()
            self._loop()
        except DivergedError:  # of another rank, perhaps
            self.model.load_state_dict(self.good)
            raise
        finally:
            if self.ranges is not None:
                self.ranges.settle()
        return Trained(
            self.step,
            self.planned,
            tuple(self.losses),
            tuple(self.marks),
            self.best_step,
            self.seconds,
            self.rate,
            self.resumed_at,
            self.skipped,
            "" if self.teacher is None else str(self.teacher),
        )

    def _loop(self) -> None:
        if self.judge is not None and not self.marks:
            self._mark()
        with steps("training", self.planned) as advance:
            advance(self.step)
            for index, inputs, labels in self.averaging.items(self._items()):
                if self.share.told(self.stop()):
                    break
                start = time.perf_counter()
                self._train(f"training batch {index}", inputs, labels)
                self.seconds += time.perf_counter() - start
                self.batch = inputs, labels
                advance(1)
                last = self.step == self.planned
                if self.judge is not None and (last or self.step % self.every == 0):
                    self._mark()
                if last or self.enough or self.step % self.training.checkpoint_every == 0:
                    with self.averaging.agreed():
                        self._keep()
        if self.step < self.planned and not self.enough:  # it was stopped
            if self.judge is not None and self.marks[-1].step < self.step:
                self._mark()
            with self.averaging.agreed():
                self._keep()
        if self.judge is not None:
            self.model.load_state_dict(self.good)

    # what comes in

    def _items(self) -> Iterator[tuple[int, ModelInputs, Any]]:
        """Batches from the current step to the last, unless it is enough before."""
        while self.step < self.planned and not self.enough:
            epoch, skip = divmod(self.step, self.batches.count)
            for item in self.batches.epoch(epoch, skip, self._go_on):
                yield item
                if self.enough or self.step == self.planned:
                    break

    def _go_on(self, last: Any) -> None:
        """Draw random numbers from where the interrupted run was; what it had used of the epoch is fetched by now."""
        restore_random_state(self.random)
        if Identity(*last).digest != self.last_batch:
            warnings.warn(
                "training data: they come otherwise than before the interruption, by randomness that does not follow "
                "the seeds of torch, numpy and Python (a generator of the loader's own?); the training goes on, but it "
                "is not what an unbroken one would be",
                stacklevel=2,
            )

    # one step

    def _train(self, where: str, inputs: ModelInputs, labels: Any) -> None:
        if self.ranges is not None and not self.ranges.moving and self.step >= self.move_at:
            self.ranges.move(True)
        share = self.training.rate(self.step, self.planned)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["base"]
        self.optimizer.zero_grad()
        with self.averaging.agreed(), named(where):
            value = self._forward_and_backward(inputs, labels)
        value = self.averaging.mean(value)
        self.averaging.gradients(self._parameters())
        with named(where):
            self._step(value)

    def _step(self, value: float) -> None:
        """Move along the gradients, unless they are not finite."""
        self.scaler.unscale_(self.optimizer)
        finite, scale = math.isfinite(self._gradient_norm()), self.scaler.get_scale()
        if finite:
            self._update()
        elif scale > 1:  # it was too large; without a scaler it is 1
            self.skipped += 1
        else:
            raise self._diverged(f"the loss is {value:.4g}, but {first_bad_gradient(self.model)}")
        self.scaler.update(None if finite else scale * self.scaler.get_backoff_factor())
        self.optimizer.zero_grad()
        self.losses.append(value)
        self.step += 1

    def _forward_and_backward(self, inputs: ModelInputs, labels: Any) -> float:
        """The loss of this rank's part of a batch, whose gradients the parameters have then."""
        part = self.averaging.part(inputs, labels)
        if part is None:
            return 0.0
        inputs, labels = (move(each, self.device) for each in part)
        try:
            loss = self._loss(inputs, labels)
        except FormatError as error:  # a range that cannot be
            raise self._diverged(f"{error}; {first_bad_value(self.model, inputs, self.enter)}") from error
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(
                f"the loss became {value}; {first_bad_value(self.model, inputs, self.enter)}"
            )
        self.scaler.scale(loss if self.averaging.weight == 1 else loss * self.averaging.weight).backward()
        return value

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _update(self) -> None:
        """Move the weights along their gradients, and what follows them."""
        if self.keeper is not None:
            self.keeper.before_step(self.step / self.planned)
        self.optimizer.step()
        if self.ranges is not None:
            self.ranges.follow()
        if self.keeper is not None:
            self.keeper.after_step()

    def _loss(self, inputs: ModelInputs, labels: Any) -> torch.Tensor:
        dtype = self.training.autocast
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            outputs = self.enter(inputs)
            total = outputs_loss(self.training, outputs, labels)
            if self.step == self.resumed_at and self.training.loss is not None:
                check_dependence(total, outputs)  # beside distillation nobody would notice
            if self.teacher is not None:
                total = total + self.teacher.distance(inputs, outputs, labels)
        return total

    def _gradient_norm(self) -> float:
        parameters = self._parameters()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.training.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.training.clip_norm, norm)
        return norm.item()

    # what is kept

    def _state(self) -> Tensors:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def _mark(self) -> None:
        assert self.judge is not None
        settled = self.ranges.settled() if self.ranges is not None else nullcontext()
        with settled, own_randomness():
            judge = self.judge
            verdict = self.share.ask(lambda: judge(self.step))
            if not self.marks or verdict.drop < min(mark.drop for mark in self.marks):
                self.good, self.best_step = self._state(), self.step
        self.marks.append(Mark(self.step, self.seconds, verdict.score, verdict.drop))
        self.enough = verdict.enough

    def _keep(self) -> None:
        """Keep the state to fall back on, and to go on from where there is a directory."""
        state = self._state()
        if self.judge is None:
            self.good, self.best_step = state, self.step
        if self.path is None:
            return
        position = {
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "marks": [asdict(mark) for mark in self.marks],
            "enough": self.enough,
            "best_step": self.best_step,
            "skipped": self.skipped,
            "scaler": self.scaler.state_dict(),
            "comparison": [] if self.teacher is None else self.teacher.state(),
            "last_batch": Identity(*self.batch).digest if self.batch else self.last_batch,
        }
        parts = {
            "model": state,
            "best": self.good,
            "optimizer": optimizer_tensors(self.optimizer),
            "random": random_state(),
            "keeper": self.keeper.state() if self.keeper is not None else {},
        }
        Checkpoint(position, parts).save(self.path, self.fingerprint)

    def _resume(self) -> None:
        found = self.share.told(Checkpoint.load(self.path, self.fingerprint) if self.path else None)
        if found is None:
            return
        self.model.load_state_dict(found.parts["model"])
        restore_optimizer(self.optimizer, found.parts.get("optimizer", {}))
        self.good = {name: tensor.to(self.device) for name, tensor in found.parts["best"].items()}
        self.random = found.parts["random"]
        if self.keeper is not None:
            self.keeper.restore(found.parts.get("keeper", {}))
        position = found.position
        self.step = self.resumed_at = position["step"]
        self.seconds, self.losses = position["seconds"], position["losses"]
        self.marks = [Mark(**mark) for mark in position["marks"]]
        self.enough, self.best_step = position["enough"], position["best_step"]
        self.last_batch, self.skipped = position["last_batch"], position["skipped"]
        self.scaler.load_state_dict(position["scaler"])
        if self.teacher is not None:
            self.teacher.restore(position["comparison"])

    def _diverged(self, what: str) -> DivergedError:
        self.optimizer.zero_grad()
        self.model.load_state_dict(self.good)
        half = self.training.autocast is torch.float16
        return DivergedError(
            f"step {self.step + 1} of {self.planned}: {what}. The model is back at step {self.best_step}. Lower "
            f"learning_rate (now {self.rate:g}) or set clip_norm (now {self.training.clip_norm}), "
            f"{'try autocast=torch.bfloat16, which has room beyond 65504, ' if half else ''}"
            "and look for NaN in the data"
        )


def learning_rate(training: Training, model: QuantizedModel) -> float:
    """The rate that ``training`` of ``model`` starts with: the one given, else what the fewest bits of a site want."""
    if training.learning_rate is not None:
        return training.learning_rate
    bits = min((site.format.bits for site in model.sites.values()), default=8)
    return default_rate(bits, training.optimizer)
