"""Writing ONNX files: quantized and float, checked, under a temporary name first."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from halfstep.errors import DataError, ExportError, RefusedError
from halfstep.export.replacing import replacing
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import MINIMUM_EQUAL, Parity, compare, compared, overall_noise
from halfstep.files import are_one
from halfstep.graph.inputs import tensors_of
from halfstep.graph.layer_precision import LayerPrecision
from halfstep.model import QuantizedModel, run
from halfstep.onnx_in.origin import Origin
from halfstep.runtime.deployed import RULES, DeployedModel
from halfstep.runtime.lint import lint
from halfstep.runtime.saturation import saturable_layers, saturates_here

#: The float network's file rounds like the network does, in another order: dB of the outputs that it keeps to at least.
FLOAT_SQNR = 40.0
#: The signal-to-noise ratio in dB that a file must reach on the example inputs: of its outputs, or else of every site
#: by itself, on the file's own codes before it. File and simulation compute with the same numbers and differ in the
#: rounding of float32 only: outputs reach 125 dB while no code lies so near to a tie that it falls to the other side.
#: Where one does, all that follows may differ, but the sites by themselves do not: they stay above 90 dB.
MINIMUM_SQNR = 60.0


def export_onnx(
    model: QuantizedModel, path: str | Path, metadata: Mapping[str, str] | None = None, check: bool = True
) -> Path:
    """Write the quantized network as ONNX, opset 21, with QuantizeLinear/DequantizeLinear where its sites are.

    The file appears under ``path`` only after onnx's checker has passed it and, with ``check``, after its runtime has
    answered the example inputs as the simulation does; a file that was there before stays until then.

    Of a dict of modules that is the file of all, side by side; ``NAME.MODULE.onnx`` beside it are those of each.

    Args:
        model: calibrated.
        path: where to.
        metadata: further key-value pairs for the file; recipe, target and versions are always in it.
        check: run the file once.

    Raises:
        ExportError: if a site is not calibrated, an operator cannot be translated, the place cannot be written to, or
            is the file that the network was read from.
        RefusedError: if onnx's checker, the target's rules or the runtime refuse the file, or it answers otherwise than
            the simulation.
    """
    missing = [name for name, site in model.sites.items() if not site.calibrated]
    if missing:
        raise ExportError(
            f"{len(missing)} of {len(model.sites)} sites have no range ({', '.join(missing[:3])} ...): run observe() "
            "and calibrate() first"
        )
    from halfstep.export.build import build_quantized, save  # onnx loads when it is needed

    _spare_source(model, Path(path))
    with replacing(Path(path), lambda file: save(build_quantized(model, metadata or {}), file)) as temporary:
        _check_rules(model, temporary)
        if check and (found := mismatch(model, temporary)):
            raise RefusedError(f"{found}. Nothing was written under the final name")
    _write_modules(model, Path(path), check)
    return Path(path)


def export_float(model: QuantizedModel, path: str | Path, check: bool = True) -> Path:
    """Write the float network (captured, batch norms folded) as ONNX: what the quantized file is compared with.

    Args:
        model: in whatever mode.
        path: where to.
        check: run the file on the target's runtime, on the example and on a batch one larger, first.

    Raises:
        ExportError: if an operator cannot be translated, the checker or the runtime refuses the file, or the file
            answers otherwise than the model.
        DataError: with ``check``, if the example inputs hold NaN.
    """
    from halfstep.export.build import build_float, save

    _spare_source(model, Path(path))
    with replacing(Path(path), lambda file: save(build_float(model), file)) as temporary:
        if check:
            _check_float(model, temporary)
    return Path(path)


def foresee(model: QuantizedModel, choices: Iterable[LayerPrecision]) -> None:
    """See to it that files with the layers at ``choices`` are written from one translation of the network.

    Each is written in a fraction of the time, then, and is the same file. A network that was read from a file needs no
    translation.

    Raises:
        ExportError: if an operator cannot be translated.
    """
    from halfstep.export.original import Original
    from halfstep.export.trace import foresee as translate

    if Original.of(model) is None:
        translate(model, choices)


def _spare_source(model: QuantizedModel, path: Path) -> None:
    """Raise rather than write over the file that the network was read from: nobody may have its weights elsewhere."""
    origin = model.captured.origin
    if isinstance(origin, Origin) and are_one(path, origin.source.path):
        raise ExportError(
            f"{path} is the file that the network was read from, which would be lost; write to another path"
        )


def _write_modules(model: QuantizedModel, path: Path, check: bool) -> None:
    """A file for each module, where there are several."""
    if model.captured.parts:
        from halfstep.export.modules import write_modules

        write_modules(model, path, check)


def copy_file(file: Path, path: Path, modules: Iterable[str] = ()) -> Path:
    """Copy an ONNX file, with the weights that lie beside it, to a place of the same file name.

    Args:
        file: what to copy.
        path: where to.
        modules: names of those whose files are copied too.

    Raises:
        ExportError: if it cannot be written.
    """
    from halfstep.runtime.file import module_file, parts

    for name in modules:
        copy_file(module_file(file, name), module_file(path, name))

    def write(temporary: Path) -> None:
        for part in parts(file):
            shutil.copyfile(part, temporary.with_name(part.name))

    with replacing(path, write):
        return path


def _check_rules(model: QuantizedModel, path: Path) -> None:
    """Hold the file to the rules of a target that cannot judge it here."""
    broken = [finding for finding in lint(path, RULES.get(model.target.name, ())) if finding.rule.refused]
    if broken:
        raise RefusedError(
            f"{model.target.name} would refuse the file: {'; '.join(map(str, broken))}. Nothing was written under the "
            "final name"
        )


def _check_float(model: QuantizedModel, path: Path) -> None:
    """Hold the file to the float network, so that what no runtime can do is known before anything is calibrated."""
    captured = model.captured
    args, kwargs = captured.example_inputs
    count = captured.batch_size(kwargs or args)
    for tensor in tensors_of(kwargs or args):
        if bad := int(torch.isnan(tensor).sum()):
            raise DataError(
                f"example_inputs: {bad} of {tensor.numel()} values are NaN; give inputs as the network will meet them"
            )
    longer = captured.select(kwargs or args, torch.tensor([*range(count), 0]))
    file = DeployedModel(path, captured.in_spec, captured.out_spec, runtime=model.target.runtime)
    with model.using(Mode.FLOAT):
        parity = compare(model, file, [kwargs or args, longer])
    if not parity.reaches(FLOAT_SQNR):
        raise ExportError(
            f"the float network's file, on {model.target.runtime}, answers otherwise than the network: "
            f"{_shortfall(parity, FLOAT_SQNR)}; look for NaN or infinite outputs, random numbers, and "
            "operators whose result is not defined (the order of equal values, say)"
        )


def mismatch(model: QuantizedModel, path: Path) -> str:
    """Where and why a file answers the example inputs otherwise than its simulation; empty if it does not.

    Outputs that differ because a value lay near to a tie, and was rounded to the other side, are none.
    """
    args, kwargs = model.captured.example_inputs
    deployed = DeployedModel(path, model.captured.in_spec, model.captured.out_spec)
    with model.using(Mode.QUANTIZE):
        parity = compare(model, deployed, [kwargs or args])
    if parity.reaches(MINIMUM_SQNR):
        return ""
    from halfstep.export.mismatch import agreements

    parting = [a for a in agreements(model, path, kwargs or args) if not a.sqnr >= MINIMUM_SQNR]
    if not parting:
        return _optimized_away(model, path, deployed)
    return (
        f"the file's outputs differ from the simulation's: {_shortfall(parity, MINIMUM_SQNR)}, and not by the rounding "
        f"of ties alone: on the file's own codes they part at {parting[0]}, needed {MINIMUM_SQNR:.0f} dB; "
        + _cure(model, path)
    )


def _optimized_away(model: QuantizedModel, path: Path, deployed: DeployedModel) -> str:
    """Why a file that is right with its sites as outputs is not without; empty if only ties fall otherwise.

    A runtime makes a network of its own of the whole one. Ties hardly change more than quantization does.
    """
    from halfstep.export.mismatch import run_watched

    args, kwargs = model.captured.example_inputs
    answers = compared(run(deployed, kwargs or args))
    watched, _ = run_watched(model, path, kwargs or args)
    if overall_noise(answers, compared(watched)) >= MINIMUM_SQNR:
        return ""
    outputs = []
    for mode in (Mode.FLOAT, Mode.QUANTIZE):
        with model.using(mode), torch.no_grad():
            outputs.append([tensor.cpu() for tensor in compared(model(*args, **kwargs))])
    floats, simulated = outputs
    found, needed = overall_noise(simulated, answers), overall_noise(floats, simulated)
    if found >= needed:
        return ""
    return (
        "the file's outputs differ from the simulation's by more than quantization changes them, "
        f"{found:.1f} dB, needed {needed:.0f} dB, and do not where its sites are outputs too: the runtime's "
        "optimizations make another network of it; leave its layers in float, one after the other, until this is gone, "
        "and report it"
    )


def _cure(model: QuantizedModel, path: Path) -> str:
    """What to do about a file that answers otherwise than it says."""
    if model.target.pair_sums and saturates_here() and (saturable := saturable_layers(path)):
        return (
            "this processor has no instructions for 8-bit dot products (VNNI), and its kernels add products of weights "
            f"of 8 bits in 16 bits, which saturate ({', '.join(map(repr, saturable[:3]))}): use "
            "hs.Recipe.int8(portable=True), which gives them 7 bits, and leaves products of two activations in float"
        )
    return (
        "leave the layer before that site in float, and report it: the runtime's kernel computes something else than "
        "its operator says, or halfstep than it simulates"
    )


def _shortfall(parity: Parity, least: float) -> str:
    """What was found and what was needed."""
    if parity.sqnr is None:
        return f"{parity.top1:.0%} of the integers are equal, needed {MINIMUM_EQUAL:.0%}"
    return f"{parity.sqnr:.1f} dB, needed {least:.0f} dB"
