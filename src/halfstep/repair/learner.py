"""How a block learns: the steps of the optimizer, what it moves, and how what was learned is kept or put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfstep.bias_shift import BiasShift
from halfstep.errors import ArgumentError
from halfstep.fake_quantize import FakeQuantize
from halfstep.fidelity.fisher import curvatures
from halfstep.fidelity.replay import FLOAT, Replay, Values, Wiring, wiring
from halfstep.functional import Gradient
from halfstep.graph.inputs import ModelInputs
from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel
from halfstep.ranges import widen_for_bias
from halfstep.repair.blocks import Block
from halfstep.repair.examples import BlockExamples
from halfstep.repair.learned import Dropping, Drops, LearnedShift, SoftRounding

#: Learning rates of Adam: of the roundings' parameters; of log2 of the weights' and of the activations' scales; of zero
#: points in codes; of biases in deviations of the layer's output. All but the first fall with the cosine to 0.
ROUNDINGS, WEIGHT_SCALES, ACTIVATION_SCALES, ZERO_POINTS, SHIFTS = 0.06, 0.003, 0.006, 0.03, 0.0015

#: All blocks together learn so many times more slowly: errors of all layers add up in a step.
TOGETHER_SLOWER = 3

#: The parts of the steps between which roundings are settled; every so many steps.
SETTLING = (0.1, 0.95)
EVERY = 10


@dataclass(frozen=True)
class Reconstruction:
    """How :func:`.reconstruct` learns.

    Attributes:
        steps: of the optimizer, for each block; None for as many as there are examples, but at most :data:`.STEPS`.
        batch: examples that a step sees.
        drop: the probability that an activation's element passes as the float network has it, within the block and
            where it is entered; 0 learns on what the quantized network makes alone.
        ranges: learn the scales of weights and activations, and zero points, as well; or leave them as calibrated.
        fisher: weigh errors of the block's output by how much the network's outputs feel them, example by example, as
            BRECQ does; off, since one draw of the outputs tells that so roughly that fewer examples count.
        whole: behind the last block, learn the scales and biases of all of them together for the network's own outputs.
        seed: of everything that is drawn.

    Raises:
        ArgumentError: naming the option that cannot be.
    """

    steps: int | None = None
    batch: int = 32
    drop: float = 0.25
    ranges: bool = True
    fisher: bool = False
    whole: bool = False
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


class Learner:
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
        self,
        block: Block,
        examples: BlockExamples,
        was: float,
        count: int,
        advance: Callable[[int], None],
        whole: bool = False,
    ) -> float:
        """Learn a block, and keep what was learned if the error falls below ``was``; the error then.

        Args:
            block: the block.
            examples: its own.
            was: the error before.
            count: of steps.
            advance: is told of each.
            whole: the block is the network, whose blocks were learned before.
        """
        parts = _Parts(self, block, examples, whole)
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
        whole: it is the network: roundings are held, every range is learned again, and nothing is dropped.
    """

    def __init__(self, learner: Learner, block: Block, examples: BlockExamples, whole: bool) -> None:
        self.learner, self.block, self.examples = learner, block, examples
        self.whole, self.drops = whole, learner.options.drop > 0 and not whole
        self._learned_before = set() if whole else learner.seen
        self.batch = min(learner.options.batch, examples.together) if whole else learner.options.batch
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
                if self.whole:
                    rounding.hold()
                self.wires[edge] = self.roundings[self._learnable[reader].name] = rounding
        elif isinstance(module, FakeQuantize):
            if self.drops:
                self.wires[edge] = Dropping(module, learner.drops)
            if options.ranges and not module.dynamic and module not in self._learned_before:
                module.learn(offset=True)
                self.ranges.append(module)
            self._learned_before.add(module)

    @torch.no_grad()
    def _deviations(self) -> dict[fx.Node, Tensor]:
        """The deviation of each layer's output in the float network, of some examples."""
        shown = next(self.examples.all())
        values = self.learner.run(self.block, shown.float_inputs, FLOAT)
        return {node: values[node].std(correction=0).clamp_min(1e-12) for node in self._learnable}

    def learn(self, count: int, advance: Callable[[int], None]) -> bool:
        """Take so many steps; False if the loss became no number, or nothing that is learned has a part in it."""
        learner = self.learner
        optimizer = torch.optim.Adam(self._groups(), fused=True)
        for step in range(count):
            done = step / count
            if step % EVERY == 0 and not self.whole:
                self._settle(done)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * (
                    0.5 + 0.5 * math.cos(math.pi * done) if group["falls"] else 1.0
                )
            shown = self.examples.draw(self.batch, learner.generator)
            inputs = dict(shown.inputs)
            if self.drops:
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
            (ROUNDINGS, False, [] if self.whole else [rounding.v for rounding in self.roundings.values()]),
            (WEIGHT_SCALES, True, growths),
            (ACTIVATION_SCALES, True, [site.growth for site in self.ranges]),
            (ZERO_POINTS, True, [site.zero for site in self.ranges]),
            (SHIFTS, True, [shift.delta for shift in self.shifts]),
        ]
        found = []
        slower = TOGETHER_SLOWER if self.whole else 1
        for rate, falls, parameters in groups:
            learned = [parameter for parameter in parameters if parameter is not None]
            if learned:
                found.append({"params": learned, "rate": rate / slower, "falls": falls})
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
