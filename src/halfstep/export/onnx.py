"""Writing ONNX files: quantized and float, checked, under a temporary name first."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from halfstep.errors import ExportError
from halfstep.fake_quantize import Mode
from halfstep.model import QuantizedModel
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.parity import MINIMUM_EQUAL, MINIMUM_SQNR, compare
from halfstep.runtime.rules import lint
from halfstep.runtime.runtimes import RULES


def export_onnx(
    model: QuantizedModel, path: str | Path, metadata: Mapping[str, str] | None = None, check: bool = True
) -> Path:
    """Write the quantized network as ONNX, opset 21, with QuantizeLinear/DequantizeLinear where its sites are.

    The file appears under ``path`` only after onnx's checker has passed it and, with ``check``, after ONNX Runtime
    has answered the example inputs as the simulation does; a file that was there before stays until then.

    Args:
        model: calibrated.
        path: where to.
        metadata: further key-value pairs for the file; recipe, target and versions are always in it.
        check: run the file once.

    Raises:
        ExportError: if a site is not calibrated, an operator cannot be translated, the checker refuses the file,
            the target's rules do, or the file answers otherwise than the simulation.
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
        raise ExportError(
            f"{model.target.name} would refuse the file: {'; '.join(map(str, broken))}. Nothing was written under the "
            "final name"
        )


def _check_parity(model: QuantizedModel, path: Path) -> None:
    args, kwargs = model.captured.example_inputs
    deployed = DeployedModel(path, model.captured.in_spec, model.captured.out_spec)
    with model.using(Mode.QUANTIZE):
        parity = compare(model, deployed, [kwargs or args])
    if not parity.reaches():
        from halfstep.export.parting import explain_parting

        found = (
            f"{parity.top1:.0%} of the integers are equal, needed {MINIMUM_EQUAL:.0%}"
            if parity.sqnr is None
            else f"{parity.sqnr:.1f} dB, needed {MINIMUM_SQNR:.0f} dB"
        )
        raise ExportError(
            f"the file's outputs differ from the simulation's: {found}; "
            f"{explain_parting(model, path, kwargs or args, MINIMUM_SQNR)}. Nothing was written under the final name; "
            "calibrate on more data, or leave the layer before that site in float"
        )
