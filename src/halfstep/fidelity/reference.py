"""What the float model answers, kept: losses under many placements, and what goals without labels learn from it.

Losses of the outputs under many placements of the quantizers, on the examples that calibration kept.

What metrics that need no labels learn from the float model before anything is scored.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halfstep.batches import example_bytes
from halfstep.distributed import share, together
from halfstep.errors import ArgumentError, MetricError, NotObservedError
from halfstep.evaluate import (
    Accuracy,
    AgainstFloat,
    CallableMetric,
    Scorer,
    Several,
    against,
    logits_of,
    parts,
)
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import (
    Measure,
    balanced,
    compared,
    default_measure,
    divergences,
    error_power,
    float_tensors,
    power,
)
from halfstep.fidelity.replay import FLOAT, Replay, Wiring, quantizing, wiring
from halfstep.graph.float32 import HandedOver
from halfstep.graph.inputs import ModelInputs
from halfstep.graph.operators import WEIGHTED, describe
from halfstep.graph.pipeline import ModulePart
from halfstep.model import QuantizedModel
from halfstep.progress import steps, track
from halfstep.runtime.deployed import DeployedModel

#: From a name for the model as it stands to how much of the metric it loses.
Drop = Callable[[str], float]

#: Activations of the whole network that may be held at a time.
HELD_BYTES = 256 * 2**20


class Probe:
    """What a method of sensitivity measures with.

    Args:
        model: calibrated.
        drop: says how much of the metric the model as it stands loses, and remembers it under the name that it is
            given; None where there is no metric.
        examples: at most so many of the kept examples.

    Attributes:
        passes: examples sent through the network so far, a partial pass counted as its share of the layers.

    Raises:
        NotObservedError: if no example was kept.
    """

    def __init__(self, model: QuantizedModel, drop: Drop | None = None, examples: int = 256) -> None:
        if examples < 1:
            raise ArgumentError(f"examples: got {examples}, needed at least 1")
        if not model.sample:
            raise NotObservedError("no example was kept to compare outputs on; run observe() first")
        self.model, self.drop, self._most = model, drop, examples
        self.replay = Replay(model)
        self.passes = 0.0
        self._weighted = {n for n in self.replay.nodes if (op := describe(n)) and op.kind in WEIGHTED}
        self.batches = list(self._cut(examples))

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return sum(map(self.model.captured.batch_size, self.batches))

    def _cut(self, examples: int) -> Iterator[ModelInputs]:
        """The kept examples in parts whose activations fit the memory set aside for them."""
        size = held_at_once(self.model)
        for batch in self.model.sample:
            stop = min(self.model.captured.batch_size(batch), examples)
            for start in range(0, stop, size):
                yield self.model.captured.examples(batch, start, min(start + size, stop))
            examples -= stop

    def wirings(self, float_layers: Iterable[frozenset[str]]) -> list[Wiring]:
        """The wiring of the model with each set of layers in float; the model is as before afterwards."""
        before, found = self.model.precision, []
        try:
            for names in track(float_layers, "placing quantizers"):
                self.model.choose(before.but(float=names))
                found.append(wiring(self.model))
        finally:
            self.model.choose(before)
        return found

    @property
    def by(self) -> Measure:
        """The :func:`.default_measure` of the outputs."""
        with torch.no_grad():
            outputs = self.replay.outputs(self.replay.run(self.batches[0]))
        return default_measure(float_tensors(outputs), bool(self.model.captured.parts))

    def __reduce__(self) -> tuple[Any, ...]:
        """Made again of the same model, as on another rank of a run; the metric is rank 0's."""
        return Probe, (self.model, None, self._most)

    def losses_of(
        self,
        float_layers: Sequence[frozenset[str]],
        by: Measure,
        base: frozenset[str] | None = None,
        what: str = "",
    ) -> list[float]:
        """:meth:`losses` of the model with each set of layers in float; the ranks of a run share them.

        Args:
            float_layers: the sets.
            by: as for :meth:`losses`.
            base: a set that they are near; None for the float network.
            what: as for :meth:`losses`.
        """
        lost, passes = together(Probe._losses_of, self, float_layers, by, base, what)
        self.passes = passes
        return lost

    def _losses_of(
        self, float_layers: Sequence[frozenset[str]], by: Measure, base: frozenset[str] | None, what: str
    ) -> tuple[list[float], float]:
        own = [index for index in range(len(float_layers)) if share().has(index)]
        placed = self.wirings([*([] if base is None else [base]), *(float_layers[index] for index in own)])
        first = FLOAT if base is None else placed.pop(0)
        wires = [FLOAT] * len(float_layers)  # those of other ranks are not looked at here
        for index, own_wires in zip(own, placed, strict=True):
            wires[index] = own_wires
        return self.losses(wires, by, first, what), self.passes

    def losses(
        self, candidates: Sequence[Wiring], by: Measure, base: Wiring = FLOAT, what: str = ""
    ) -> list[float]:
        """How far each candidate's outputs are from the float network's.

        Each candidate is computed from ``base`` by redoing only what depends on the difference. Ranks that share the
        work take every so many-th candidate, and rank 0 has the losses of all.

        Args:
            candidates: where the quantizers sit.
            by: ``"kl"``: mean Kullback-Leibler divergence in nats of the softmax over the last axis of the first float
                output; ``"sqnr"``: sum of squared errors over sum of squares, all float outputs; of a model that
                returns integers alone, the share that differs.
            base: a wiring that is near the candidates.
            what: told to the progress listener.

        Returns:
            A loss for each candidate, 0 for equal outputs, inf for NaN.

        Raises:
            ArgumentError: ``"kl"`` of outputs that are no logits.
        """
        mine = share()
        own = [index for index in range(len(candidates)) if mine.has(index)]
        found: list[
            dict[int, tuple[float, int]]
        ] = []  # a batch each: loss and layers computed again, by candidate
        weight = 0.0
        total = len(self.batches) * len(own)
        with quantizing([base, *candidates]), steps(what or "comparing outputs", total) as advance:
            for inputs in self.batches:
                values = self.replay.run(inputs)
                wanted = self.replay.outputs(values)
                scale = balanced(self.model.captured, [wanted])
                if base:
                    values = self.replay.run(inputs, base)
                weight += loss_weight(wanted, by, scale)
                found.append({})
                for index in own:
                    changed = self.replay.change(values, base, candidates[index])
                    loss = _loss(wanted, self.replay.outputs({**values, **changed}), by, scale)
                    found[-1][index] = loss, sum(node in self._weighted for node in changed)
                    advance(1)
        parts = mine.gather(found, "losses")
        if not mine.leads:
            return []
        totals = torch.zeros(len(candidates), dtype=torch.float64)
        for place, inputs in enumerate(self.batches):
            size = self.model.captured.batch_size(inputs)
            self.passes += size * (2 if base else 1)
            for index in range(len(candidates)):
                loss, redone = parts[mine.owner(index)][place][index]
                totals[index] += loss
                self.passes += size * redone / max(len(self._weighted), 1)
        return [math.inf if math.isnan(loss) else loss for loss in (totals / weight).tolist()]


def held_at_once(model: QuantizedModel) -> int:
    """Examples whose activations in the whole network fit :data:`HELD_BYTES`, at least one."""
    nodes = (node for node in model.graph.nodes if node.op == "call_function")
    return max(1, HELD_BYTES // max(1, sum(example_bytes(node, model.captured.axes) for node in nodes)))


def loss_weight(wanted: Any, by: Measure, scale: Callable[[Any], list[torch.Tensor]] = compared) -> float:
    """What a batch's loss is divided by: its decisions, or its signal, of outputs to the scale that they count in."""
    if by == "sqnr":
        return power(scale(wanted)) or 1.0
    shape = logits_of(wanted).shape
    if len(shape) < 2 or shape[-1] < 2:
        raise ArgumentError(
            f"sensitivity: the divergence (kl) needs logits (..., classes), got outputs of shape {tuple(shape)}; use "
            "method='sqnr'"
        )
    return float(math.prod(shape[:-1]))


def _loss(wanted: Any, got: Any, by: Measure, scale: Callable[[Any], list[torch.Tensor]]) -> float:
    if by == "kl":
        return float(divergences(logits_of(wanted), logits_of(got)).sum())
    return error_power(scale(wanted), scale(got))


def knowing_float(scorer: Scorer, model: QuantizedModel) -> Scorer:
    """``scorer`` with the float model's answers, where it compares with them and has none yet.

    One pass, made before training or anything else could change the parameters. Of a dict of modules, functions from a
    model to a number are given a dict of the modules, each to be called by itself.

    Args:
        scorer: the metric.
        model: in whatever mode; its float network, as it was handed over, answers.

    Raises:
        MetricError: if an answer is none that can be compared with, or several modules are to have an accuracy.
        DataError: naming the batch, if the model does not take its inputs.
    """
    if model.captured.parts:
        alone = {name: _of_modules(part, model) for name, part in parts(scorer).items()}
        scorer = Several(alone) if isinstance(scorer, Several) else alone[""]
    if not any(isinstance(part, AgainstFloat) and part.place is None for part in parts(scorer).values()):
        return scorer
    with model.using(Mode.FLOAT), steps("asking the float model for its answers"):
        return against(scorer, model.handed_over)


@dataclass(frozen=True)
class _OfModules:
    """A metric's function that takes a dict of modules, as one that takes the network that they were captured as."""

    function: Callable[[Any], float]
    parts: Mapping[str, ModulePart]

    def __call__(self, network: QuantizedModel | HandedOver | DeployedModel) -> float:
        if isinstance(network, DeployedModel):
            return self.function(network.modules_alone(self.parts))
        return self.function(network.modules_alone())


def _of_modules(scorer: Scorer, model: QuantizedModel) -> Scorer:
    """A function's metric as one whose function is called with the modules alone; any other as it is.

    Raises:
        MetricError: of an :class:`Accuracy`, which would look at what the first module returns.
    """
    if isinstance(scorer, Accuracy):
        raise MetricError(
            "metric: got hs.Accuracy for several modules, needed hs.Metric(labelled, score), whose score gets a dict "
            "of what each returns, or a function that gets a dict of the modules"
        )
    if not isinstance(scorer, CallableMetric) or isinstance(scorer.function, _OfModules):
        return scorer
    twin = copy.copy(scorer)
    twin.function = _OfModules(scorer.function, model.captured.parts)
    return twin
