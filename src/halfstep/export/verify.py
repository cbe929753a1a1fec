"""The proof that comes with a file: parity, integer kernels, latency, size."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfstep.errors import DataError, ExportError
from halfstep.export.onnx import export_float
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Parity, compare
from halfstep.formats import Integer
from halfstep.granularity import PerGroup
from halfstep.graph.inputs import ModelInputs, call_arguments
from halfstep.graph.operators import readable_names
from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel
from halfstep.runtime.deployed import DeployedModel, inspect_kernels, layer_of, layer_times, to_numpy
from halfstep.runtime.file import file_size
from halfstep.runtime.latency import Latency, race
from halfstep.runtime.runtime import Kernels
from halfstep.runtime.saturation import holds_on, saturable_layers

#: A file that gives the simulation's answer to so many fewer of the examples than it did answers otherwise.
FEWER_ANSWERS = 0.01
#: Seconds after which a race of files need not go on.
RACED = 0.15


@dataclass(frozen=True)
class Fact:
    """One thing to know of a run.

    Attributes:
        name: what it is, in words; no two facts of a run have the same.
        words: what it comes to, as it is shown.
        key: under which a page keeps the exact number behind the words; empty where there is none.
        value: that number.
    """

    name: str
    words: str
    key: str = ""
    value: float = math.nan


@dataclass(frozen=True)
class LayerFate:
    """What became of a layer on the runtime.

    Attributes:
        name: the layer's.
        kind: conv, linear ...
        integer: it runs on an integer kernel.
        reason: why not; empty if it does.
    """

    name: str
    kind: str
    integer: bool
    reason: str


@dataclass(frozen=True)
class Verification:
    """What a file turned out to be.

    Attributes:
        parity: agreement of the file with the simulation.
        layers: every layer, in order of execution.
        float_operators: name, kind and reason of the other operators that run in float.
        kernels: the runtime's own account.
        latency: ``{"float": ..., "null": ..., "quantized": ...}`` for the first batch; "null" is the float file a
            second time: what its speed-up differs from 1 is noise.
        size: bytes of the quantized file, with what lies beside it.
        float_size: bytes of the float file.
        microseconds: that each layer and operator takes of a run on the first batch, by name, measured in runs of its
            own; without what the runtime does in between. Empty where the target's hardware is not here.
        saturable: layers that may answer otherwise on x86 processors without VNNI, where integer kernels add two
            products in 16 bits; empty if the file answers alike on every processor.
        sizes: the same races on the shortest and the longest of the batches, where sizes vary beside the batch and are
            not those of the first; by words such as ``"tokens 16"``.
    """

    parity: Parity
    layers: tuple[LayerFate, ...]
    float_operators: tuple[tuple[str, str, str], ...]
    kernels: Kernels
    latency: dict[str, Latency]
    size: int
    float_size: int
    microseconds: Mapping[str, float] = field(default_factory=dict)
    saturable: tuple[str, ...] = ()
    sizes: Mapping[str, dict[str, Latency]] = field(default_factory=dict)

    @property
    def integer_layers(self) -> int:
        """How many layers run on integer kernels."""
        return sum(layer.integer for layer in self.layers)

    def __str__(self) -> str:
        """A line for every fact, and for every layer that is not on an integer kernel why."""
        facts = file_facts(self.to_dict())
        width = max(len(fact.name) for fact in facts)
        lines = [f"{fact.name:<{width}}  {fact.words}" for fact in facts]
        floating = [layer for layer in self.layers if not layer.integer]
        return "\n".join(
            [*lines, *(f"{layer.name} ({layer.kind}) is float: {layer.reason}" for layer in floating)]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; NaN and infinity are as they are."""
        return {
            "parity": asdict(self.parity),
            "latency_ms": {name: asdict(value) for name, value in self.latency.items()},
            "latency_by_size": {
                words: {name: asdict(value) for name, value in raced.items()}
                for words, raced in self.sizes.items()
            },
            "microseconds": dict(self.microseconds),
            "bytes": self.size,
            "float_bytes": self.float_size,
            "kernels": self.kernels.counts,
            "saturable": list(self.saturable),
            "layers": [asdict(layer) for layer in self.layers],
            "float_operators": [
                dict(zip(("name", "kind", "reason"), op, strict=True)) for op in self.float_operators
            ],
        }


def file_facts(record: Mapping[str, Any]) -> list[Fact]:
    """What was measured on a file.

    Args:
        record: of :meth:`.Verification.to_dict`; it may have ``latency``, the speed over float that was asked.
    """
    layers, raced = record["layers"], record["latency_ms"]
    quantized, null = raced["quantized"], raced["null"]
    asked = "" if record.get("latency") is None else f", asked {record['latency']:g}x"
    return [
        *(Fact(*row) for row in Parity.of(record["parity"]).rows()),
        Fact("layers on integer kernels", f"{sum(layer['integer'] for layer in layers)} of {len(layers)}"),
        Fact("answers hold on", holds_on(record.get("saturable", ()))),
        Fact(
            "file size",
            f"{record['bytes'] / 1024:,.0f} KiB, {record['bytes'] / record['float_bytes']:.2f} of float",
        ),
        Fact("latency", f"{quantized['median']:.2f} ms ± {quantized['spread'] / 2:.0%}"),
        Fact(
            "speed over float",
            f"{quantized['speedup']:.2f}x (float against itself {null['speedup']:.2f}x{asked})",
            "speedup",
            quantized["speedup"],
        ),
        *(
            Fact(
                f"at {words}",
                f"{(speed := times['quantized']['speedup']):.2f}x",
                f"speedup at {words}",
                speed,
            )
            for words, times in record.get("latency_by_size", {}).items()
        ),
    ]


def verify(
    path: str | Path,
    model: QuantizedModel,
    batches: Iterable[ModelInputs],
    float_path: str | Path | None = None,
    threads: int | None = None,
    rounds: int = 21,
    classes: bool = True,
) -> Verification:
    """Run a file on the runtime of its target and say what it is.

    Args:
        path: the quantized ONNX file.
        model: the simulation that it was exported from.
        batches: inputs to compare on; the first one is timed, and where sizes vary beside the batch also the shortest
            and the longest.
        float_path: the float network's file; written to a temporary place if None.
        threads: for one operator; None for all cores.
        rounds: interleaved runs to time; a third of them is enough where they take longer than :data:`RACED`.
        classes: whether the first output may be taken for scores of classes, so that the largest is the answer.

    Raises:
        ExportError: if the file cannot be loaded.
        DataError: if there are no batches.
    """
    path = Path(path)
    if not path.exists():
        raise ExportError(f"{path} does not exist; write it with hs.export_onnx(model, {str(path)!r})")
    kept = list(batches)
    with tempfile.TemporaryDirectory() as directory:
        if float_path is None:
            float_path = export_float(model, Path(directory) / "float.onnx")
        specs = model.captured.in_spec, model.captured.out_spec
        runtime = model.target.runtime
        deployed, reference = (DeployedModel(p, *specs, threads, runtime) for p in (path, float_path))
        with model.using(Mode.QUANTIZE):
            parity = compare(model, deployed, kept, classes)
        leaves = model.file_inputs(kept[0])
        contestants = {"float": reference, "null": reference, "quantized": deployed}

        def raced(inputs: Sequence[torch.Tensor]) -> dict[str, Latency]:
            runs = {name: functools.partial(run, *inputs) for name, run in contestants.items()}
            return race(runs, rounds, warmup=1, seconds=RACED)

        latency = raced(leaves)
        sizes = {
            words: raced(model.file_inputs(inputs)) for words, inputs in _other_sizes(model, kept).items()
        }
        kernels = inspect_kernels(path, threads, runtime)
        return Verification(
            parity,
            layer_fates(model, kernels),
            float_fates(model, kernels),
            kernels,
            latency,
            file_size(path),
            file_size(float_path),
            layer_times(path, [to_numpy(leaf) for leaf in leaves], threads, runtime, _own_names(model)),
            saturable_layers(path) if model.target.pair_sums else (),
            sizes,
        )


def _other_sizes(model: QuantizedModel, batches: Sequence[ModelInputs]) -> dict[str, ModelInputs]:
    """The shortest and the longest of the batches, by their sizes in words, unless they are the first's."""
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    found: dict[tuple[int, ...], tuple[str, ModelInputs]] = {}
    for inputs in batches:
        sizes = model.captured.axes.sizes(placeholders, model.flatten(*call_arguments(inputs)))
        words = ", ".join(f"{name} {size}" for name, size in sizes.items())
        found.setdefault(tuple(sizes.values()), (words, inputs))
    first, *_ = found
    ends = (min(found, key=math.prod), max(found, key=math.prod))
    return dict(found[sizes] for sizes in dict.fromkeys(ends) if sizes != first)


def _own_names(model: QuantizedModel) -> set[str] | None:
    """What nodes may be called in a file that keeps the names it had; None for files of our own."""
    return None if model.captured.origin is None else set(readable_names(model.graph).values())


def regressions(proof: Verification, baseline: Mapping[str, Any]) -> tuple[str, ...]:
    """How a file falls behind what was recorded of it on another machine or with other versions; empty if in nothing.

    Args:
        proof: the file as it is proven now.
        baseline: what :meth:`.Outcome.to_dict` (``outcome.json``) recorded.

    Returns:
        A sentence for each layer or operator that ran on integers and does not now, and one where the file gives the
        simulation's answer to fewer examples, by more than :data:`FEWER_ANSWERS` and more than one.

    Raises:
        DataError: if ``baseline`` is no such record.
    """
    try:
        integer = {layer["name"] for layer in baseline["layers"] if layer["integer"]}
        floating = {name for name, _, _ in (tuple(op.values()) for op in baseline["float_operators"])}
        known = Parity.of(baseline["parity"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"baseline: got no record of a run ({type(error).__name__}: {error}), needed the outcome.json of one"
        ) from None
    lost = [
        f"layer {layer.name!r} ran on integers and is in float now: {layer.reason}"
        for layer in proof.layers
        if layer.name in integer and not layer.integer
    ]
    lost += [
        f"{kind} {name!r} ran on integers and is in float now: it {reason}"
        for name, kind, reason in proof.float_operators
        if name not in floating
    ]
    now = proof.parity
    if now.top1 is not None and known.top1 is not None:
        fewer = known.top1 - now.top1
        if fewer > FEWER_ANSWERS and fewer * now.examples > 1.5:
            lost.append(
                f"{now.top1:.2%} of {now.examples:,} answers are the simulation's, {known.top1:.2%} were"
            )
    return tuple(lost)


def layer_fates(model: QuantizedModel, kernels: Kernels) -> tuple[LayerFate, ...]:
    """Every layer of ``model``, with what the runtime made of it."""
    names = {layer.name for layer in model.layers}
    integer, packed = (
        {layer_of(node, names) for node in nodes} for nodes in (kernels.integer, kernels.packed)
    )
    fates = []
    for layer in model.layers:
        real = layer.name in integer
        reason = "" if real else layer.reason or _why_float(model, layer, layer.name in packed)
        fates.append(LayerFate(layer.name, layer.operator.kind, real, reason))
    return tuple(fates)


def _why_float(model: QuantizedModel, layer: Layer, packed: bool) -> str:
    """Why a quantized layer is on no integer kernel: what became of its weight, if that is the reason."""
    weight = layer.operator.weight
    site = model.sites.get(str(weight.target)) if weight is not None else None
    if site is not None and packed:
        doing = (
            "dequantized row by row" if layer.operator.kind in model.target.tables else "multiplied in float"
        )
        return f"its weight of {site.format.bits} bits stays packed in memory and is {doing}"
    plain = site is None or (isinstance(site.format, Integer) and not isinstance(site.granularity, PerGroup))
    if site is not None and (not plain or len(layer.sites) == 1):
        return (
            f"its weight of {site.format.bits} bits is unpacked when the file is loaded and multiplied in float: a "
            "smaller file, no faster"
        )
    wide = {
        site.format.bits for site in model.placement.sites if site.name in layer.sites and not site.is_weight
    }
    if simulated := sorted(wide & model.target.simulated_bits):
        return f"{model.target.name} computes layers with {simulated[0]}-bit activations in float, between such codes"
    return "the runtime has no integer kernel for it as it stands in the graph"


def float_fates(model: QuantizedModel, kernels: Kernels) -> tuple[tuple[str, str, str], ...]:
    """Name, kind and reason of the operators beside the layers that run in float.

    Those that placement left there, and those (adds, pools) that it put between quantizers in vain.
    """
    names = {op.name for op in model.placement.followers}
    integer = {layer_of(node, names) for node in kernels.integer}
    floating = {op.name: (op.operator.kind, op.reason) for op in model.placement.float_operators}
    for op in model.placement.followers:
        if op.name not in integer:
            reason = "stands between quantizers, but the runtime found no integer kernel for it there"
            floating[op.name] = (op.operator.kind, reason)
    return tuple((name, kind, reason) for name, (kind, reason) in floating.items())
