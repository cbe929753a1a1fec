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

from halfstep.fidelity.compare import default_measure
from halfstep.fidelity.reference import held_at_once
from halfstep.formats import Floating
from halfstep.graph.inputs import ModelInputs, move
from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel
from halfstep.progress import Interrupted, steps
from halfstep.repair.blocks import find_blocks, whole_network
from halfstep.repair.examples import TOGETHER, BlockExamples
from halfstep.repair.learner import Learner, Reconstruction
from halfstep.repair.moments import SHARED, is_shared
from halfstep.repair.ranges import sample_of
from halfstep.repair.record import TIME_UP, Repair, Treated
from halfstep.repair.walk import examples_that_fit, walk_blocks

MEASURE = (
    "mean squared error of the block's output over its mean square, weighted if asked for; of the whole network's "
    "logits their divergence"
)

#: Steps for each block at most, where they are not given.
STEPS = 512

#: All blocks together take so many times fewer: only ranges and biases are learned, and a step is one of the network.
TOGETHER_LESS = 2

#: A block whose output is this near is left alone: 30 dB.
NEAR_ENOUGH = 1e-3


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
    output's error falls on the sample. If asked for, the scales and biases of all are learned together behind the last
    one, for the network's own outputs: logits by their divergence from the float network's, others by their squared
    errors. The float network stays what it is.

    Takes minutes where other repairs take seconds, and pays at 4 bits and fewer. 1,024 examples are a good number.

    Args:
        model: calibrated; best repaired by the quick passes before.
        batches: model inputs; if None all that the model kept, its sample and ``model.reserve``. Where the values
            between blocks would take more than :data:`halfstep.repair.walk.MEMORY`, only as many examples as fit are
            used.
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
    examples = _pieces(
        model, sample_of(model, batches, many=True), examples_that_fit(model, found), options.batch
    )
    count = options.steps or min(STEPS, sum(map(model.captured.batch_size, examples)))
    learner = Learner(model, options)
    for layer in (layer for block in found for layer in block.layers):
        if why := why_not_learned(model, layer):
            learner.left_alone[layer] = why
    treated, skipped, notes = [], [], list[str]()
    left = "the blocks behind it are as they were"
    together = max(1, count // TOGETHER_LESS) if options.whole else 0
    try:
        weights = learner.curvatures(found, examples, notes)
        walked = closing(walk_blocks(model, examples, found))
        with walked as runs, steps("reconstruction", len(found) * count + together) as advance:
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
            left = "the blocks were not learned together"
            if together and treated:
                treated += _whole(learner, examples, together, advance)
    except Interrupted:
        if not treated:
            raise
        notes.append(f"{TIME_UP} {treated[-1].name}: {left}")
    return Repair(
        "reconstruction",
        MEASURE,
        tuple(treated),
        (*((layer.name, why) for layer, why in learner.left_alone.items()), *skipped),
        tuple(notes),
        time.perf_counter() - start,
    )


def _whole(
    learner: Learner, examples: Sequence[ModelInputs], count: int, advance: Callable[[int], None]
) -> list[Treated]:
    """Learn all blocks together for the network's outputs; nothing where those are integers."""
    model, clock, block = learner.model, time.perf_counter(), whole_network(learner.model)
    if not block.outputs:
        return []
    with closing(walk_blocks(model, examples, [block])) as runs:  # while it is open, the model quantizes
        run = next(runs)
        first, *more = block.outputs
        by = default_measure([run.targets[0][first]], bool(model.captured.parts))
        logits = first if by == "kl" and not more else None
        shown = BlockExamples(model, run, [{} for _ in examples], min(TOGETHER, held_at_once(model)), logits)
        was = learner.error(block, shown)
        now = learner.learn(block, shown, was, count, advance, whole=True)
    return [Treated(block.name, was, now, time.perf_counter() - clock)]


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
