"""Observing a model on data and giving its sites their ranges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch.utils import _pytree as pytree

from halfstep.batches import abreast
from halfstep.calibration.candidates import BEFORE, FLOAT, BestOf, Candidate, Sweep
from halfstep.calibration.diagnostics import BATCH, concerns, sentences
from halfstep.calibration.shards import gather_shares
from halfstep.calibration.stages import observe_in_stages, usable
from halfstep.calibration.sweep import sweep, sweep_activations
from halfstep.calibrators import Calibrator, Max, WeightCalibrator
from halfstep.cores import one_thread
from halfstep.distributed import share
from halfstep.errors import ArgumentError, DataError, named
from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.fidelity.compare import Fidelity, Measure, Reference
from halfstep.graph.inputs import ModelInputs, call_arguments, tensors_of
from halfstep.model import QuantizedModel, run
from halfstep.progress import track
from halfstep.ranges import activation_answers, activation_sites, own_answers, set_ranges, weight_answers
from halfstep.recipe import FEW_BITS
from halfstep.repair.ranges import observe_sites
from halfstep.statistics import Histogram

#: The calibration inputs that a model keeps for scoring without labels: at most so many examples and bytes.
SAMPLE_EXAMPLES = 256


SAMPLE_BYTES = 32 * 2**20


#: Repairs are fitted on one half of them and judged on the other. So that neither is a matter of luck, as many examples
#: as this are kept even where they are larger, up to so many bytes.
SAMPLE_LEAST = 16


SAMPLE_MOST_BYTES = 512 * 2**20

#: What learns from examples (:func:`~halfstep.reconstruct`) wants so many in all, up to so many bytes beyond the
#: sample. They are kept where a site has few bits: with more of them nothing is left to learn.
LEARNED_EXAMPLES = 1024


LEARNED_BYTES = 256 * 2**20

#: Calibrators that were chosen before stay unless others leave less than a part of this of the error: the
#: order of nearly equal ones is a matter of the examples.
GIVES_WAY = 2.0


def observe(
    model: QuantizedModel,
    batches: Iterable[ModelInputs] | Mapping[str, Iterable[ModelInputs]],
    batch_ranges: bool = False,
    device: torch.device | str | None = None,
) -> dict[str, Histogram]:
    """Run the float network once over ``batches``; every activation's site fills its histogram.

    Batches run side by side where memory has room, so a few are taken before the first is done.
    Observing again adds to what is there. The first examples are kept in ``model.sample`` for scoring without labels
    and for repairs: at most :data:`SAMPLE_EXAMPLES` and :data:`SAMPLE_BYTES`, but :data:`SAMPLE_LEAST` of them even so,
    if :data:`SAMPLE_MOST_BYTES` have room. Warns where they have not. Where a site has fewer than :data:`.FEW_BITS`
    bits, those behind them are kept in ``model.reserve`` for what learns from many, :data:`LEARNED_EXAMPLES` in all.

    Args:
        model: its mode is the same afterwards.
        batches: inputs, each a tensor, a tuple or a dict; iterated once, batches may differ in size. Of several modules
            also a dict of them.
        batch_ranges: also keep the range of every batch, which only :class:`MovingAverage` asks for.
        device: for a network that has no room there, such as ``"cuda"`` for one in the host's memory: its layers and
            blocks run on it one after the other, each with the parameters of one alone, and all batches pass one
            before the next. Parameters that are mapped from files are read once. All batches are held where the model
            is, and what a block hands on of each. The statistics are the same. None runs the network where it is.

    Returns:
        The histograms by site.

    Raises:
        DataError: if there is no batch, or one has a wrong shape or type, or makes NaN (naming batch and site).
        ArgumentError: if earlier batches were observed without ``batch_ranges``, or ``device`` is not there.
    """
    if device is not None:
        device = usable(device)
    if batch_ranges:
        _keep_batch_ranges(model)
    seen = 0
    ordered = any(module.histogram.keeps_batch_ranges for module in activation_sites(model).values())

    mine, count = share(), 0
    observing = list(activation_sites(model).values())
    fed = _own(model, track(model.captured.batches(batches), "observing"))

    def work(index: int, inputs: ModelInputs) -> ModelInputs:
        if mine.has_in_turn(index):
            BATCH.set(index)
            with named(f"calibration batch {index}"):
                run(model, inputs)
                FakeQuantize.check_observed(observing)
        return inputs

    with model.using(Mode.OBSERVE), torch.no_grad():
        passed = iter(fed) if device is not None else abreast(model, work, fed, ordered)
        held = []
        for inputs in passed:
            _keep(model, inputs)
            if device is not None and mine.has_in_turn(count):
                held.append((count, inputs))
            seen, count = seen + model.captured.batch_size(inputs), count + 1
        if device is not None:
            observe_in_stages(model, held, device)
    mine.same("batches of calibration data:", count, "give every rank the same data, all of them")
    if not seen:
        raise DataError(
            "calibration data: got no batch, needed at least one (a generator can be used only once)"
        )
    gather_shares(model)
    kept = kept_examples(model)
    if kept < min(SAMPLE_LEAST, seen):
        each = sum(tensor.nbytes for batch in model.sample for tensor in tensors_of(batch)) / kept
        warnings.warn(
            f"calibration data: {kept} of {seen:,} examples are kept to compare outputs on, since each takes "
            f"{each / 2**20:.0f} MiB and {SAMPLE_MOST_BYTES / 2**20:.0f} are set aside; repairs and the choice of "
            f"calibrators rest on them, and {SAMPLE_LEAST} are wanted: give smaller inputs, or hs.repair(model, "
            "batches=...) more of them",
            stacklevel=2,
        )
    return {name: module.histogram for name, module in activation_sites(model).items()}


def _own(model: QuantizedModel, batches: Iterable[ModelInputs]) -> Iterator[ModelInputs]:
    """Copies of batches that the model takes: whoever made them may use the memory again for the next one.

    Raises:
        DataError: naming the batch, if it has a wrong shape or type.
    """
    for index, inputs in enumerate(batches):
        with named(f"calibration batch {index}"):
            model.flatten(*call_arguments(inputs))
        yield _cloned(inputs)


def _keep_batch_ranges(model: QuantizedModel) -> None:
    if share().size > 1:
        raise ArgumentError(
            "batch_ranges: got True on several ranks, which see a part of the batches each; MovingAverage needs their "
            "order: observe on one"
        )
    for name, module in activation_sites(model).items():
        if module.histogram.keeps_batch_ranges:
            continue
        if module.histogram.count:
            raise ArgumentError(
                f"site {name!r}: earlier batches were observed without batch_ranges=True; prepare the model anew"
            )
        module.forget(batch_ranges=True)


def _keep(model: QuantizedModel, inputs: ModelInputs) -> None:
    """Add a copy of the first examples to the model's sample, up to its bounds."""
    size, kept = model.captured.batch_size(inputs), kept_examples(model)
    used = sum(tensor.nbytes for batch in model.sample for tensor in tensors_of(batch))
    each = max(1, sum(tensor.nbytes for tensor in tensors_of(inputs)) / max(size, 1))
    fitting = int((SAMPLE_BYTES - used) // each)
    least = min(SAMPLE_LEAST - kept, int((SAMPLE_MOST_BYTES - used) // each))
    count = min(size, SAMPLE_EXAMPLES - kept, max(fitting, least, not model.sample))
    if count > 0:
        model.sample.append(_copied(model, inputs, 0, count))
    if share().leads and any(site.format.bits < FEW_BITS for site in model.sites.values()):
        wanted = LEARNED_EXAMPLES - kept_examples(model) - sum(map(model.captured.batch_size, model.reserve))
        used = sum(tensor.nbytes for batch in model.reserve for tensor in tensors_of(batch))
        start = max(count, 0)
        more = min(size - start, wanted, int((LEARNED_BYTES - used) // each))
        if more > 0:
            model.reserve.append(_copied(model, inputs, start, start + more))


def _copied(model: QuantizedModel, inputs: ModelInputs, start: int, stop: int) -> ModelInputs:
    """Some examples of a batch in memory of their own."""
    return _cloned(model.captured.examples(inputs, start, stop))


def _cloned(inputs: ModelInputs) -> ModelInputs:
    with one_thread():  # batches before run meanwhile
        copies: ModelInputs = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
    return copies


def kept_examples(model: QuantizedModel) -> int:
    """How many examples :func:`observe` has kept."""
    return sum(map(model.captured.batch_size, model.sample))


@overload
def calibrate(
    model: QuantizedModel, calibrator: BestOf, weights: WeightCalibrator | None = None
) -> Sweep: ...


@overload
def calibrate(
    model: QuantizedModel, calibrator: Calibrator | None = None, weights: WeightCalibrator | None = None
) -> None: ...


def calibrate(
    model: QuantizedModel,
    calibrator: Calibrator | BestOf | None = None,
    weights: WeightCalibrator | None = None,
) -> Sweep | None:
    """Give every site its scale and zero point, and let the model quantize from now on.

    No data are needed: the histograms of :func:`observe` answer any calibrator and any number format, and
    :func:`best_of` compares outputs on the examples that it kept.

    Warns of sites that saw only zeros or infinities, and of a percentile that rests on too few values or leaves out
    most of those that are not zero.

    Args:
        model: observed.
        calibrator: for the activations, Max if None; or :func:`best_of`, which finds the best of several.
        weights: for the weights; None is Max, or what :func:`best_of` says.

    Returns:
        The candidates with their figures after :func:`best_of`, else None.

    Raises:
        NotObservedError: naming the site that saw no data.
    """
    if isinstance(calibrator, BestOf):
        return sweep(model, calibrator if weights is None else replace(calibrator, weights=(weights,)))
    chosen = calibrator or Max()
    FakeQuantize.check_observed(activation_sites(model).values())  # of a loop of one's own
    answers = activation_answers(model, chosen) | weight_answers(model, weights or Max())
    set_ranges(model, answers)
    # What a concat loses is a matter of the layer that reads it, whatever the calibrator: a run decides on that.
    found = [each for each in concerns(model, (chosen,)) if each.concern.kind != "lost"]
    for sentence in sentences(found):
        warnings.warn(sentence, stacklevel=2)
    return None


def calibrate_moved(
    model: QuantizedModel,
    moved: Collection[str],
    batches: Sequence[ModelInputs],
    options: BestOf,
    reference: Reference,
) -> Candidate:
    """Observe activations again whose distributions have changed, and choose the calibrators of all of them anew.

    A calibrator suits a distribution: where channels differed by powers of two, a range that clips most of them may
    have been the best. Those that sites have had stay all the same, asked of the new statistics, unless others are
    clearly better: see :data:`GIVES_WAY`. Weights are in float meanwhile, since repairs of theirs are still to come;
    each keeps its own calibrator.

    Args:
        model: calibrated; left with the ranges that were chosen, quantizing.
        moved: the activations' sites, one at least.
        batches: model inputs to observe.
        options: what to try; the measure alone decides.
        reference: examples to compare outputs on.

    Returns:
        What was chosen.
    """
    observe_sites(model, moved, batches)
    answers = own_answers(model)
    set_ranges(model, answers)
    with model.using(Mode.QUANTIZE, weights=False):
        before = reference.compare(model, "comparing calibrators")
    best = sweep_activations(model, options, reference).best
    if not _clearly_less(best.fidelity, before, options.by):
        best = Candidate(BEFORE, FLOAT, before)
    set_ranges(model, answers | dict(best.answers))
    return best


def _clearly_less(error: Fidelity, than: Fidelity, by: Measure) -> bool:
    """Whether the error is that much less, by a measure in nats or in dB."""
    if by == "kl":
        return error.loss(by) * GIVES_WAY < than.loss(by)
    return error.loss(by) + 10 * math.log10(GIVES_WAY) < than.loss(by)
