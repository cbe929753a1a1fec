"""Where a file and its simulation part: each site by itself, from what the file has before it.

Quantizers make much of little: where a value lies so near to a tie that two ways of rounding float32 take it to
different sides, what follows differs by a step here and there, and so, layer after layer, does the rest, although
nothing is wrong. So the simulation is led along the file, site by site: what it makes of the file's own codes is what
the file must have rounded, and a code is right if that lies within half a step of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.fidelity.compare import compared, overall_noise, signal_to_noise
from halfstep.graph.inputs import ModelInputs, call_arguments
from halfstep.model import QuantizedModel
from halfstep.runtime.deployed import find_runtime, to_numpy

#: What the outputs are called beside the sites.
OUTPUTS = "the outputs"


@dataclass(frozen=True)
class SiteAgreement:
    """How far file and simulation agree at a site, from what the file has at the sites before it.

    Attributes:
        site: its name, or :data:`OUTPUTS`.
        sqnr: signal to noise in dB. Noise is by how much values lie further than half a step from the file's codes; at
            sites whose range is computed at run time, and of the outputs, any difference.
        others: codes that the simulation rounds otherwise, for instance ties.
        codes: how many there are; 0 where floats are compared.
        beyond: by how much the furthest value exceeds half a step, in steps.
    """

    site: str
    sqnr: float
    others: int = 0
    codes: int = 0
    beyond: float = 0.0

    def __str__(self) -> str:
        where = self.site if self.site == OUTPUTS else f"site {self.site!r}"
        beyond = f", {self.beyond:.3g} steps beyond half a one" if self.codes else ""
        return f"{where} ({self.sqnr:.1f} dB{beyond})"


def agreements(model: QuantizedModel, path: Path, inputs: ModelInputs) -> list[SiteAgreement]:
    """Agreement at every site of an activation, in order of execution, and of the outputs.

    The file is run with what its codes at every site stand for (the floats, where the range is computed at run time) as
    further outputs. That leaves its kernels as they are, which the codes themselves would not: OpenVINO keeps signed
    ones then, for which kernels without VNNI halve the weights. Sites of which the file shows neither are passed over.

    Args:
        model: the simulation.
        path: the file.
        inputs: one batch.
    """
    outputs, seen = run_watched(model, path, inputs)
    found: dict[str, SiteAgreement] = {}
    with _led(model, seen, found), model.using(Mode.QUANTIZE), torch.no_grad():
        args, kwargs = call_arguments(inputs)
        wanted = [tensor.cpu() for tensor in compared(model(*args, **kwargs))]
    return [*found.values(), SiteAgreement(OUTPUTS, overall_noise(wanted, compared(outputs)))]


def run_watched(
    model: QuantizedModel, path: Path, inputs: ModelInputs
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The file's outputs, and what it has at each site: codes, or the floats that a range is computed from."""
    onnx_model = onnx.load(path)
    watched = _watched(model, onnx_model.graph)
    count = len(onnx_model.graph.output)
    names = [value.name for value in onnx_model.graph.output]
    names += [tensor for tensor in dict.fromkeys(watched.values()) if tensor not in names]
    onnx_model.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, names[count:]))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "watched.onnx"
        onnx.save(onnx_model, file, save_as_external_data=path.stat().st_size > 2**30)
        session = find_runtime(model.target.runtime).open(file, None)
        arrays = session.run([to_numpy(tensor) for tensor in model.file_inputs(inputs)])
    tensors = list(map(torch.from_numpy, arrays))
    values = dict(zip(names, tensors, strict=True))
    seen = {site: values[tensor] for site, tensor in watched.items()}
    return tensors[:count], {
        site: value if model.sites[site].dynamic else _codes(model.sites[site], value)
        for site, value in seen.items()
    }


def _watched(model: QuantizedModel, graph: onnx.GraphProto) -> dict[str, str]:
    """The tensor of the file that shows each site: the floats of its codes, or what a run-time range is computed from.

    The former get a node of their own.
    """
    constant = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    at_run_time = {
        layer.name: name for layer in model.layers for name in layer.sites if model.sites[name].dynamic
    }
    found = {}
    for node in list(graph.node):
        owner, _, kind = node.name.rpartition("/")
        if node.op_type == "MatMulNBits":
            owner = at_run_time.get(owner, "")
        site = model.sites.get(owner)
        if site is None or kind != node.op_type or owner in found:
            continue
        if not site.dynamic and kind == "QuantizeLinear":
            found[owner] = f"{node.output[0]}/watched"
            operands = [node.output[0], *node.input[1:]]
            shown = onnx.helper.make_node("DequantizeLinear", operands, [found[owner]], found[owner])
            shown.attribute.extend(node.attribute)
            graph.node.append(shown)
        elif site.dynamic and node.input[0] not in constant:
            found[owner] = node.input[0]
    return found


@contextmanager
def _led(
    model: QuantizedModel, seen: Mapping[str, Tensor], found: dict[str, SiteAgreement]
) -> Iterator[None]:
    """Let sites hand on what the file has there, and compare what comes to them, the first time that something does."""

    def lead(name: str, module: FakeQuantize, x: Tensor) -> Tensor | None:
        theirs = seen[name].to(x.device)
        if name in found or theirs.shape != x.shape:
            return None
        if module.dynamic:
            found[name] = SiteAgreement(name, signal_to_noise(x.double(), theirs.double()))
            return module.rounded(theirs.to(x.dtype))
        found[name], values = _compared(name, module, x, theirs)
        return values.to(x.dtype)

    handles = [
        model.sites[name].register_forward_hook(
            lambda module, inputs, _, name=name: lead(name, module, inputs[0])
        )
        for name in seen
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compared(name: str, module: FakeQuantize, x: Tensor, codes: Tensor) -> tuple[SiteAgreement, Tensor]:
    """The agreement of what comes to a site with the file's codes there, and the numbers that these stand for."""
    scale, zero_point, low, high = (
        module.granularity.expand(parameter, x.shape).double()
        for parameter in (module.scale, module.zero_point, *module.range())
    )
    signal = codes - zero_point
    away = signal - x.double().maximum(low).minimum(high) / scale
    beyond = (away.abs() - 0.5).clamp_min(0.0)
    sqnr = signal_to_noise(signal * scale, (signal - beyond) * scale)
    others = int((module.rounded(x).double() / scale).round().ne(signal).sum())
    furthest = float(beyond.max()) if codes.numel() else 0.0
    return SiteAgreement(name, sqnr, others, codes.numel(), furthest), signal * scale


def _codes(module: FakeQuantize, floats: Tensor) -> Tensor:
    """The codes that a site's floats stand for, as int32."""
    scale, zero_point = (
        module.granularity.expand(parameter, floats.shape).cpu().double()
        for parameter in (module.scale, module.zero_point)
    )
    return ((floats.double() / scale).round() + zero_point).int()
