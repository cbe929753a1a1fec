"""Reconstruction: a block's roundings, ranges and biases are learned together, so that its output stays the float one.

Repairs that go layer by layer undo what each layer loses by itself. In a block one layer may make up for what another
loses, and only what leaves the block counts. No labels are needed: the target is what the float block makes of what the
float network gives it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfstep.bias_shift import BiasShift
from halfstep.errors import ArgumentError
from halfstep.fake_quantize import FakeQuantize
from halfstep.fidelity.fisher import curvatures
from halfstep.fidelity.reference import held_at_once
from halfstep.fidelity.replay import FLOAT, Replay, Values, Wiring, wiring
from halfstep.formats import Floating
from halfstep.functional import Gradient
from halfstep.graph.inputs import ModelInputs, move
from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel
from halfstep.progress import Interrupted, steps
from halfstep.ranges import widen_for_bias
from halfstep.repair.blocks import Block, find_blocks
from halfstep.repair.examples import BlockExamples
from halfstep.repair.learned import Dropping, Drops, LearnedShift, SoftRounding
from halfstep.repair.moments import SHARED, is_shared
from halfstep.repair.ranges import sample_of
from halfstep.repair.record import TIME_UP, Repair, Treated
from halfstep.repair.walk import examples_that_fit, walk_blocks

MEASURE = "mean squared error of the block's output over its mean square, weighted if asked for"

#: Steps for each block at most, where they are not given.
STEPS = 512

#: A block whose output is this near is left alone: 30 dB.
NEAR_ENOUGH = 1e-3

#: Learning rates of Adam: of the roundings' parameters; of log2 of the weights' and of the activations' scales; of zero
#: points in codes; of biases in deviations of the layer's output. All but the first fall with the cosine to 0.
ROUNDINGS, WEIGHT_SCALES, ACTIVATION_SCALES, ZERO_POINTS, SHIFTS = 0.02, 0.001, 0.002, 0.01, 0.0005

#: The parts of the steps between which roundings are settled; every so many steps.
SETTLING = (0.1, 0.95)
EVERY = 10


@dataclass(frozen=True)
class Reconstruction:
    """How :func:`reconstruct` learns.

    Attributes:
        steps: of the optimizer, for each block; None for as many as there are examples, but at most :data:`STEPS`.
        batch: examples that a step sees.
        drop: the probability that an activation's element passes as the float network has it, within the block and
            where it is entered; 0 learns on what the quantized network makes alone.
        ranges: learn the scales of weights and activations, and zero points, as well; or leave them as calibrated.
        fisher: weigh errors of the block's output by how much the network's outputs feel them.
        seed: of everything that is drawn.

    Raises:
        ArgumentError: naming the option that cannot be.
    """

    steps: int | None = None
    batch: int = 32
    drop: float = 0.5
    ranges: bool = True
    fisher: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"Reconstruction: {name} is {value}, needed at least 1")
        if not 0 <= self.drop < 1:  # NaN is neither
            raise ArgumentError(
                f"Reconstruction: drop is {self.drop}, needed a probability from 0 to below 1: with 1 nothing would "
                "be quantized"
            )


def reconstruct(
    model: QuantizedModel,
    batches: Iterable[ModelInputs] | None = None,
    blocks: Iterable[str] | None = None,
    options: Reconstruction | None = None,
) -> Repair:
    """Learn the roundings of weights, the ranges, and the shifts of biases of one block after another.

    A block is what a skip spans or the module around it (a residual or transformer block), or a layer by itself; see
    :func:`.find_blocks`. Each is learned on what the reconstructed blocks before it make, mixed with what the float
    network has there, for the output that the float block has in the float network. A block is taken only where that
    output's error falls on the sample. The float network stays what it is.

    Takes minutes where other repairs take seconds, and pays at 4 bits and fewer. 1,024 examples are a good number.

    Args:
        model: calibrated; best repaired by the quick passes before.
        batches: model inputs; the sample that the model kept if None. Where the values between blocks would take more
            than :data:`halfstep.repair.walk.MEMORY`, only as many examples as fit are used.
        blocks: paths of modules, or shell-style patterns of them, that are blocks; layers outside are so by themselves.
            None to find them.
        options: see :class:`Reconstruction`.

    Raises:
        DataError: if there are no inputs.
        ArgumentError: blocks that the network has not, that overlap, or that are no blocks.

    Source: blocks and the Fisher weight of Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block
    Reconstruction", 2021, sections 3.2 and 3.3; the dropping of :class:`.Dropping`; the roundings of
    :class:`.SoftRounding`; scales by LSQ's gradient, of Esser et al., 2020.
    """
    start = time.perf_counter()
    options = options or Reconstruction()
    found = find_blocks(model, blocks)
    examples = _pieces(model, sample_of(model, batches), examples_that_fit(model, found), options.batch)
    count = options.steps or min(STEPS, sum(map(model.captured.batch_size, examples)))
    learner = _Learner(model, options)
    for layer in (layer for block in found for layer in block.layers):
        if why := why_not_learned(model, layer):
            learner.left_alone[layer] = why
    treated, skipped, notes = [], [], list[str]()
    try:
        weights = learner.curvatures(found, examples, notes)
        walked = closing(walk_blocks(model, examples, found))
        with walked as runs, steps("reconstruction", len(found) * count) as advance:
            for run in runs:
                clock, block = time.perf_counter(), run.block
                if not learner.left_alone.keys() >= set(block.layers):
                    shown = BlockExamples(model, run, weights)
                    if not (was := learner.error(block, shown)) <= NEAR_ENOUGH:  # NaN is to be learned too
                        now = learner.learn(block, shown, was, count, advance)
                        treated.append(Treated(block.name, was, now, time.perf_counter() - clock))
                        continue
                    near = -10 * math.log10(NEAR_ENOUGH)
                    skipped.append((block.name, f"its output is within {near:.0f} dB already"))
                advance(count)
    except Interrupted:
        if not treated:
            raise
        notes.append(f"{TIME_UP} {treated[-1].name}: the blocks behind it are as they were")
    return Repair(
        "reconstruction",
        MEASURE,
        tuple(treated),
        (*((layer.name, why) for layer, why in learner.left_alone.items()), *skipped),
        tuple(notes),
        time.perf_counter() - start,
    )


def _pieces(model: QuantizedModel, batches: Sequence[ModelInputs], most: int, size: int) -> list[ModelInputs]:
    """The first examples in pieces of a size that a backward pass has room for, where the model is."""
    size = min(size, held_at_once(model))
    found = []
    for batch in batches:
        stop = min(model.captured.batch_size(batch), most)
        for start in range(0, stop, size):
            found.append(move(model.captured.examples(batch, start, min(start + size, stop)), model.device))
        most -= stop
    return found


class _Learner:
    """What all blocks of a reconstruction share.

    Args:
        model: calibrated.
        options: how to learn.
    """

    def __init__(self, model: QuantizedModel, options: Reconstruction) -> None:
        self.model, self.options = model, options
        self.replay, self.wires = Replay(model), wiring(model)
        self.parameters = self.replay.parameters()
        self.generator = torch.Generator().manual_seed(options.seed)
        self.drops = Drops(options.drop, options.seed, model.device)
        self.weight_sites = {model.sites[site.name] for site in model.placement.sites if site.is_weight}
        self.left_alone: dict[Layer, str] = {}
        #: Activations' sites that earlier blocks read too: their ranges are learned there.
        self.seen: set[FakeQuantize] = set()

    def curvatures(
        self, blocks: Sequence[Block], examples: Sequence[ModelInputs], notes: list[str]
    ) -> list[dict[fx.Node, Tensor]]:
        """The weights of errors of the blocks' outputs, for each batch; empty where they are not asked for."""
        if not self.options.fisher:
            return [{} for _ in examples]
        nodes = {node for block in blocks for node in block.outputs}
        found = curvatures(self.model, examples, nodes, seed=self.options.seed)
        if lacking := nodes - found[0].keys():
            names = ", ".join(block.name for block in blocks if lacking & set(block.outputs))
            notes.append(
                f"the network's outputs have no gradient at those of {names}: errors there count alike"
            )
        return found

    def run(self, block: Block, inputs: Values, wires: Wiring) -> Values:
        """The values of a block's nodes."""
        values = {**self.parameters, **inputs}
        for node in (*block.sizes, *block.nodes):
            values[node] = self.replay.compute(node, values, wires)
        return values

    @torch.no_grad()
    def error(self, block: Block, examples: BlockExamples) -> float:
        """How far the quantized block as it is, on what the quantized network gives it, is from the float one."""
        total, count = 0.0, 0
        for shown in examples.all():
            size = examples.count(shown)
            total += size * float(examples.loss(shown, self.run(block, shown.inputs, self.wires)))
            count += size
        return total / count

    def learn(
        self, block: Block, examples: BlockExamples, was: float, count: int, advance: Callable[[int], None]
    ) -> float:
        """Learn a block, and keep what was learned if the error falls below ``was``; the error then."""
        parts = _Parts(self, block, examples)
        try:
            if parts.learn(count, advance):
                parts.keep()
                now = self.error(block, examples)
                if now < was:
                    return now
        except BaseException:
            parts.put_back()
            raise
        parts.put_back()
        return was


class _Parts:
    """What learns in a block, in the places of the quantizers that it learns for.

    Args:
        learner: whose block it is.
        block: the block.
        examples: its examples.
    """

    def __init__(self, learner: _Learner, block: Block, examples: BlockExamples) -> None:
        self.learner, self.block, self.examples = learner, block, examples
        self.wires = dict(learner.wires)
        self.roundings: dict[str, SoftRounding] = {}  # by the layer's name
        self.shifts: list[LearnedShift] = []
        self.ranges: list[FakeQuantize] = []
        inside = set(block.nodes)
        inner = {edge: module for edge, module in learner.wires.items() if edge[1] in inside}
        self._before = [_State.of(module) for module in dict.fromkeys(inner.values())]
        self._learnable = {
            layer.operator.node: layer for layer in block.layers if layer not in learner.left_alone
        }
        self._units = self._deviations()
        for edge, module in inner.items():
            self._replace(edge, module)

    def _replace(self, edge: tuple[fx.Node, fx.Node], module: nn.Module) -> None:
        """Put what learns, or drops, on an edge of the block."""
        value, reader = edge
        learner, options = self.learner, self.learner.options
        if isinstance(module, BiasShift):
            if reader in self._learnable:
                self.shifts.append(LearnedShift(module, self._units[reader]))
                self.wires[edge] = self.shifts[-1]
        elif module in learner.weight_sites:
            if reader in self._learnable:
                assert isinstance(module, FakeQuantize)
                weight = learner.parameters[value]
                rounding = SoftRounding(module, weight, options.ranges)
                self.wires[edge] = self.roundings[self._learnable[reader].name] = rounding
        elif isinstance(module, FakeQuantize):
            if options.drop:
                self.wires[edge] = Dropping(module, learner.drops)
            if options.ranges and not module.dynamic and module not in learner.seen:
                module.learn(offset=True)
                self.ranges.append(module)
            learner.seen.add(module)

    @torch.no_grad()
    def _deviations(self) -> dict[fx.Node, Tensor]:
        """The deviation of each layer's output in the float network, of some examples."""
        shown = next(self.examples.all())
        values = self.learner.run(self.block, shown.float_inputs, FLOAT)
        return {node: values[node].std(correction=0).clamp_min(1e-12) for node in self._learnable}

    def learn(self, count: int, advance: Callable[[int], None]) -> bool:
        """Take so many steps; False if the loss became no number, or nothing that is learned has a part in it."""
        learner, options = self.learner, self.learner.options
        optimizer = torch.optim.Adam(self._groups())
        for step in range(count):
            done = step / count
            if step % EVERY == 0:
                self._settle(done)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * (
                    0.5 + 0.5 * math.cos(math.pi * done) if group["falls"] else 1.0
                )
            shown = self.examples.draw(options.batch, learner.generator)
            inputs = dict(shown.inputs)
            if options.drop:
                for node in self.examples.differing:
                    inputs[node] = learner.drops.mix(shown.float_inputs[node], inputs[node])
            with torch.enable_grad():
                loss = self.examples.loss(shown, learner.run(self.block, inputs, self.wires))
                if not (loss.requires_grad and math.isfinite(loss.item())):
                    return False
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            advance(1)
        return True

    def _groups(self) -> list[dict[str, Any]]:
        """What the optimizer moves, with the learning rates."""
        growths = [rounding.site.growth for rounding in self.roundings.values()]
        groups: list[tuple[float, bool, Sequence[nn.Parameter | None]]] = [
            (ROUNDINGS, False, [rounding.v for rounding in self.roundings.values()]),
            (WEIGHT_SCALES, True, growths),
            (ACTIVATION_SCALES, True, [site.growth for site in self.ranges]),
            (ZERO_POINTS, True, [site.zero for site in self.ranges]),
            (SHIFTS, True, [shift.delta for shift in self.shifts]),
        ]
        found = []
        for rate, falls, parameters in groups:
            learned = [parameter for parameter in parameters if parameter is not None]
            if learned:
                found.append({"params": learned, "rate": rate, "falls": falls})
        return found

    def _settle(self, done: float) -> None:
        """Settle as many roundings as are due after so much of the steps: quickly at first, then ever fewer."""
        start, end = SETTLING
        left = 1 - min(1.0, max(0.0, (done - start) / (end - start)))
        for rounding in self.roundings.values():
            rounding.settle(1 - left**2)

    @torch.no_grad()
    def keep(self) -> None:
        """Write what was learned where other repairs write: ranges and roundings to the sites, shifts to the biases."""
        model = self.learner.model
        for site in (*self.ranges, *(rounding.site for rounding in self.roundings.values())):
            site.settle()
        for rounding in self.roundings.values():
            rounding.settle(1.0)
            rounding.site.offset = None
        for shift in self.shifts:
            shift.keep()
        changed = {site.name for site in self.ranges} | {
            rounding.site.name for rounding in self.roundings.values()
        }
        for layer in model.layers:
            if changed & set(layer.sites):
                widen_for_bias(model, layer)
        for rounding in self.roundings.values():
            site = rounding.site
            site.round_to_codes(model.weight(site.name).detach(), rounding.codes())
        for state in self._before:
            state.gradient_again()

    def put_back(self) -> None:
        """Leave the block as it was."""
        for state in self._before:
            state.restore()


@dataclass(frozen=True)
class _State:
    """A quantizer or a bias's shift before it learned."""

    module: nn.Module
    buffers: dict[str, Tensor]
    offset: Tensor | None
    gradient: Gradient | None

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        """As it is now."""
        buffers = {
            name: tensor.clone() for name, tensor in module.named_buffers(recurse=False) if name != "offset"
        }
        if isinstance(module, FakeQuantize):
            return cls(module, buffers, module.offset, module.gradient)
        return cls(module, buffers, None, None)

    @torch.no_grad()
    def restore(self) -> None:
        """Put it back."""
        if isinstance(self.module, FakeQuantize):
            self.module.growth = self.module.zero = None
            self.module.offset = self.offset
        for name, tensor in self.module.named_buffers(recurse=False):
            if name in self.buffers:
                tensor.copy_(self.buffers[name])
        self.gradient_again()

    def gradient_again(self) -> None:
        """Let the quantizer pass gradients as it did: learning ranges has its own way."""
        if isinstance(self.module, FakeQuantize) and self.gradient is not None:
            self.module.gradient = self.gradient


def why_not_learned(model: QuantizedModel, layer: Layer) -> str:
    """Why a quantized layer's rounding is not learned; empty if it is."""
    assert layer.operator.weight is not None
    name = str(layer.operator.weight.target)
    if is_shared(next(site for site in model.placement.sites if site.name == name)):
        return SHARED
    if layer.operator.kind == "embedding":
        return "it looks rows up, and nothing is multiplied: to nearest is the best"
    if isinstance(model.sites[name].format, Floating):
        return f"numbers of {model.sites[name].format} have no next ones by their codes"
    return ""
