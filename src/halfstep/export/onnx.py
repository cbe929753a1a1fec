"""Writing ONNX files: quantized and float, checked, under a temporary name first."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from halfstep.errors import ExportError, RefusedError
from halfstep.fake_quantize import Mode
from halfstep.model import QuantizedModel
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.parity import compare
from halfstep.runtime.rules import lint
from halfstep.runtime.runtimes import RULES

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

    Args:
        model: calibrated.
        path: where to.
        metadata: further key-value pairs for the file; recipe, target and versions are always in it.
        check: run the file once.

    Raises:
        ExportError: if a site is not calibrated, an operator cannot be translated, or the place cannot be written to.
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

    with _written(Path(path), lambda file: save(build_quantized(model, metadata or {}), file)) as temporary:
        _check_rules(model, temporary)
        if check:
            _check_parity(model, temporary)
    return Path(path)


def export_float(model: QuantizedModel, path: str | Path) -> Path:
    """Write the float network (captured, batch norms folded) as ONNX: what the quantized file is compared with.

    Raises:
        ExportError: as :func:`export_onnx`.
    """
    from halfstep.export.build import build_float, save

    with _written(Path(path), lambda file: save(build_float(model), file)):
        return Path(path)


@contextmanager
def _written(path: Path, write: Callable[[Path], None]) -> Iterator[Path]:
    """The file under a temporary name beside ``path``; renamed when the block ends well, removed when it does not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        directory = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ExportError(
            f"cannot write to {path.parent}: {error.strerror}; choose a directory you own"
        ) from error
    with directory as name:
        temporary = Path(name) / path.name
        try:
            write(temporary)
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error.strerror}") from error
        yield temporary
        try:
            weights = Path(name) / f"{path.name}.data"
            if not weights.exists():  # those of a larger file that was here before
                (path.parent / weights.name).unlink(missing_ok=True)
            for file in Path(name).iterdir():  # the model, and its weights where they lie beside it
                os.replace(file, path.parent / file.name)
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error.strerror}") from error


def _check_rules(model: QuantizedModel, path: Path) -> None:
    """Hold the file to the rules of a target that cannot judge it here."""
    broken = [finding for finding in lint(path, RULES.get(model.target.name, ())) if finding.rule.refused]
    if broken:
        raise RefusedError(
            f"{model.target.name} would refuse the file: {'; '.join(map(str, broken))}. Nothing was written under the "
            "final name"
        )


def _check_parity(model: QuantizedModel, path: Path) -> None:
    """Hold the file's answers to the example inputs to :data:`MINIMUM_SQNR`."""
    args, kwargs = model.captured.example_inputs
    deployed = DeployedModel(path, model.captured.in_spec, model.captured.out_spec)
    with model.using(Mode.QUANTIZE):
        parity = compare(model, deployed, [kwargs or args])
    if parity.sqnr >= MINIMUM_SQNR:
        return
    from halfstep.export.parting import agreements

    parting = [a for a in agreements(model, path, kwargs or args) if not a.sqnr >= MINIMUM_SQNR]
    if parting:
        raise RefusedError(
            f"the file's outputs differ from the simulation's: {parity.sqnr:.1f} dB, and not by the rounding of ties "
            f"alone: on the file's own codes they part at {parting[0]}, needed {MINIMUM_SQNR:.0f} dB. Nothing was "
            "written under the final name; leave the layer before that site in float, and report it: the runtime's "
            "kernel computes something else than its operator says, or halfstep than it simulates"
        )
