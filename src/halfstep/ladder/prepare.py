"""A network as halfstep works on it: captured, folded, its sites placed.

Whether weights have 7 bits where sums could saturate: settled at a run's beginning, and said.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from halfstep.errors import ArgumentError, CaptureError
from halfstep.graph.capture import capture
from halfstep.graph.captured import Captured
from halfstep.graph.float32 import check_observed_in
from halfstep.graph.fold import decompose, fold
from halfstep.graph.inputs import ModelInputs
from halfstep.graph.mapped import mapped, on_meta
from halfstep.graph.padding import Mask, find_padding
from halfstep.graph.pipeline import Pipeline, joined_example
from halfstep.graph.place import place
from halfstep.graph.shapes import Dynamic
from halfstep.graph.states import States, mark_states
from halfstep.graph.tails import mark_tails
from halfstep.journal import Entry
from halfstep.ladder.repairs import refit
from halfstep.ladder.search import Search
from halfstep.model import QuantizedModel
from halfstep.onnx_in.from_file import declared_axes, opened, origin_of
from halfstep.progress import steps
from halfstep.recipe import Recipe
from halfstep.runtime.saturation import saturates_here
from halfstep.targets import Target, find_target


def prepare(
    model: nn.Module | str | Path | Mapping[str, nn.Module],
    example_inputs: ModelInputs | None,
    recipe: Recipe | None = None,
    target: str | Target = "onnxruntime",
    *,
    dynamic: Dynamic | None = None,
    padding: Mask | None = None,
    float_from: str | Sequence[str] | None = None,
    states: States = None,
    autocast: torch.dtype | None = None,
    weights: str | Path | Iterable[str | Path] | None = None,
) -> QuantizedModel:
    """Capture ``model``, fold its batch norms, and place its sites; it passes floats until observed and calibrated.

    Args:
        model: left untouched; or the path of an ONNX file, which :func:`.from_onnx` reads; or several modules by name,
            which are one network from here on: called with the inputs of each by its name, it returns a dict of what
            each returns, and its layers are called ``"encoder.layer"``.
        example_inputs: a tensor, a tuple or a dict, with a batch of at least 2; None makes some up for a file. Of
            several modules a dict of them.
        recipe: what to quantize, and how; :meth:`Recipe.int8` if None.
        target: where it will run.
        dynamic: dimensions that may vary beside the batch: names by input and dimension, such as
            ``{"ids": {1: "tokens"}, "mask": {1: "tokens"}}``; or another example, whose sizes differ where they may.
            The batch is the first dimension, or the one that is named ``"batch"``: ``{"x": {0: "time", 1: "batch"},
            "h": {1: "batch"}}`` is time first, with a state of (layers, batch, hidden).
            None for those that an ONNX file names, ``{}`` for none of them.
        padding: the name of an input (batch, length) that is 0 where a batch is only filled up, such as
            ``"attention_mask"``, or a function of the model's arguments that answers one: what is observed there is
            left out. The length must be one that varies.
        float_from: names of modules, such as ``"head.decode"``, from whose first value on everything is left in float;
            or of single operators.
        states: outputs that are given back as inputs of the next call, by the input's name, ``{"h_in": "h_out"}``; True
            finds them by their names (``past_k`` and ``present_k``, a key of both ...). Both have one quantizer.
        autocast: ``torch.bfloat16`` lets :func:`.observe` run the network in torch's automatic mixed precision, which
            halves its memory and on accelerators much of its time; what is seen is counted in float32 all the same.
            Scores, comparisons of outputs and repairs compute in float32, as the file does; trainings have an option of
            their own. None for float32.
        weights: files of safetensors with the model's tensors, of a module that was made without memory, under
            ``torch.device("meta")``. They are mapped: read where they are used, without a copy in memory. None for a
            module that has its tensors.

    Warns of a model in half precision or float64 that it is computed in float32 from here on. It may then be given
    inputs of either type, and returns float32, as the files do; scores are compared with the model as it was handed
    over.

    Raises:
        CaptureError: if the model cannot be captured.
        RecipeError: if a pattern of the recipe matches no layer.
        ArgumentError: if ``dynamic``, ``padding``, ``float_from`` or ``states`` names what is not there, or
            ``autocast`` is another type; or ``weights`` do not fit, or are missing for a module without memory.
    """
    check_observed_in(autocast)
    check_model(model, weights)
    found = find_target(target)
    settled = settle(recipe or Recipe.int8(), found)
    if isinstance(model, Mapping):
        model = Pipeline(model)
        example_inputs = joined_example(dict(model.named_children()), example_inputs)
    with steps("capturing"):
        model, example_inputs = opened(model, example_inputs)
        if weights is not None:
            traced = capture(mapped(model, weights), example_inputs, dynamic, taken_over=True)
        elif dynamic is not None:
            traced = capture(model, example_inputs, dynamic)
        else:
            traced = _capture(model, example_inputs)
        captured = decompose(fold(traced), found.decomposed)
        if (origin := origin_of(model)) is not None:
            captured.origin = origin
            captured.notes += origin.source.notes
            captured.read_in = origin.source.types
            if captured.handed_over is not None:
                captured.notes += (
                    "Files are new graphs in torch.float32, not the one that the network was read from",
                )
            origin.keep_whole(captured.graph, found)
        mark_tails(captured, float_from)
        mark_states(captured, states)
        known = None if padding is None else find_padding(captured, padding)
        prepared = QuantizedModel(captured, found, settled, known, autocast)
    prepared.refit = refit
    for note in captured.notes:
        warnings.warn(note, stacklevel=2)
    return prepared


def check_model(model: object, weights: object = None) -> None:
    """Raise for what is no model, or quantized already, or has no tensors, or is given files beside its own."""
    if not isinstance(model, (nn.Module, str, Path, Mapping)):
        raise ArgumentError(
            f"model: got {model.__name__ if isinstance(model, type) else type(model).__name__}, needed a "
            "torch.nn.Module, the path of an ONNX file, or a dict of them"
        )
    if isinstance(model, QuantizedModel):
        raise ArgumentError(
            "model is a QuantizedModel already; set its float_layers or calibrate it as it is, or hand over the float "
            "model that it was made from"
        )
    if weights is not None and not isinstance(model, nn.Module):
        raise ArgumentError(
            f"weights: got files beside {'several modules' if isinstance(model, Mapping) else 'an ONNX file'}, needed "
            'one module, made under torch.device("meta")'
        )
    if weights is None and isinstance(model, nn.Module) and on_meta(model):
        raise ArgumentError(
            f"model {type(model).__name__} has parameters or buffers without memory (on the device meta); give their "
            "files, hs.prepare(model, ..., weights='model.safetensors'), or load them first"
        )


def _capture(model: nn.Module, example_inputs: ModelInputs) -> Captured:
    """The captured network; of one that was read from a file with the dimensions varying that the file names."""
    alternatives, reason = declared_axes(model, example_inputs), ""
    for dynamic in alternatives:
        try:
            return capture(model, example_inputs, dynamic)
        except CaptureError as error:
            reason = reason or str(error)
    captured = capture(model, example_inputs)
    if alternatives:
        names = sorted({name for sizes in alternatives[0].values() for name in sizes.values()})
        captured.notes += (
            f"The file lets {', '.join(map(repr, names))} vary, but its network is captured with the sizes of the "
            f"example alone, and calibration data must have them: {reason}",
        )
    return captured


#: The entry of the journal that says how a recipe's ``portable`` was settled where the recipe leaves it open.
PORTABLE = "portable"


def settle(recipe: Recipe, target: Target, entries: Iterable[Entry] = ()) -> Recipe:
    """The recipe with ``portable`` said: as the run with these entries has it, else as this processor needs it.

    Raises:
        ArgumentError: for what is no recipe.
    """
    if not isinstance(recipe, Recipe):
        raise ArgumentError(f"recipe: got {recipe!r}, needed a Recipe, such as hs.Recipe.int8()")
    if recipe.portable is not None:
        return recipe
    known = [entry.data["portable"] for entry in entries if entry.kind == PORTABLE]
    return replace(recipe, portable=known[-1] if known else target.pair_sums and saturates_here())


def narrower_weights(search: Search) -> str:
    """What a portable recipe that nobody asked for keeps from 8 bits, and why, in a sentence; empty if nothing."""
    model = search.model
    if not (search.journal.of(PORTABLE) and model.recipe.portable):
        return ""
    asked = place(model.graph, model.target, replace(model.recipe, portable=False), model.precision)
    formats = {site.name: site.format for site in asked.sites if site.is_weight}
    narrower = [
        site for site in model.placement.sites if site.is_weight and site.format != formats[site.name]
    ]
    if not narrower:
        return ""
    floats = sum(bool(a.reason) > bool(b.reason) for a, b in zip(model.layers, asked.layers, strict=True))
    products = f", and {floats} products of two activations are left in float" if floats else ""
    return (
        f"{len(narrower)} of {len(formats)} weights have {narrower[0].format.bits} bits instead of "
        f"{formats[narrower[0].name].bits}{products}: where this run began, integer kernels add products in "
        "16 bits, which would saturate (an x86 processor without VNNI). portable=True asks for this on every "
        "processor, so that the file answers alike on all of them; portable=False keeps the bits"
    )
