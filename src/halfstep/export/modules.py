"""A file for each module of a dict, beside the file of all: each holds what its module computes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from halfstep.errors import RefusedError
from halfstep.export.build import save
from halfstep.export.editing import drop_unused
from halfstep.export.replacing import replacing
from halfstep.fidelity.compare import compare
from halfstep.graph.pipeline import ModulePart
from halfstep.model import QuantizedModel
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.file import module_file

#: What a module's file answers must be what the file of all does, but for the order of sums: so many dB.
SAME_SQNR = 100.0


def write_modules(model: QuantizedModel, path: Path, check: bool = True) -> None:
    """Write ``NAME.MODULE.onnx`` for every module, from a file of all of them.

    Args:
        model: that the file was exported from.
        path: the file of all.
        check: run each file once, on the example inputs, and hold it to what the file of all answers.

    Raises:
        ExportError: if a file cannot be written.
        RefusedError: if onnx's checker or the runtime refuses a file, or it answers otherwise.
    """
    captured = model.captured
    inputs = captured.example_inputs[1]
    runtime = model.target.runtime
    answers = {}
    if check:
        whole = DeployedModel(path, captured.in_spec, captured.out_spec, runtime=runtime)
        with torch.no_grad():
            answers = whole(**inputs)
    for name, part in captured.parts.items():
        with replacing(module_file(path, name), _writer(path, part, model)) as temporary:
            if not check:
                continue
            file = DeployedModel(temporary, part.in_spec, part.out_spec, runtime=runtime)
            parity = compare(_answering(answers[name]), file, [inputs[name]], classes=False)
            if not parity.reaches(SAME_SQNR):
                raise RefusedError(
                    f"module {name!r}: its file answers otherwise than the file of all modules does, "
                    f"{parity.rows()[-1][1]}, needed {SAME_SQNR:.0f} dB; please report the model's architecture"
                )


def _answering(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _writer(path: Path, part: ModulePart, model: QuantizedModel) -> Callable[[Path], None]:
    """What writes the file of one module."""
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    inputs = {str(placeholders[place].target) for place in part.inputs}

    def write(file: Path) -> None:
        onnx_model = ir.load(path)
        graph = onnx_model.graph
        outputs = [graph.outputs[place] for place in part.outputs]
        graph.outputs[:] = outputs
        drop_unused(graph)
        graph.inputs[:] = [value for value in graph.inputs if value.name in inputs]
        save(onnx_model, file)

    return write
