"""Where a file and its simulation part: site by site, from the input on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch.utils.hooks import RemovableHandle

from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.graph.inputs import ModelInputs, call_arguments, tensors_of
from halfstep.model import QuantizedModel
from halfstep.runtime.deployed import to_numpy
from halfstep.runtime.parity import signal_to_noise
from halfstep.runtime.runtimes import find_runtime


@dataclass(frozen=True)
class Agreement:
    """How far file and simulation agree at a site.

    Attributes:
        site: its name.
        sqnr: signal to noise in dB.
    """

    site: str
    sqnr: float


def explain_parting(model: QuantizedModel, path: Path, inputs: ModelInputs, bound: float) -> str:
    """The first site at which a file and its simulation agree by less than ``bound`` dB, in words.

    The file is run with the codes of every site as further outputs.

    Args:
        model: the simulation.
        path: the file.
        inputs: one batch.
        bound: in dB.
    """
    found = agreements(model, path, inputs)
    before = Agreement("the input", float("inf"))
    for agreement in found:
        if agreement.sqnr < bound:
            known = f", {before.sqnr:.1f} dB at {before.site!r} before it" if before.sqnr < np.inf else ""
            return f"they part at site {agreement.site!r} ({agreement.sqnr:.1f} dB there{known})"
        before = agreement
    if not found:
        return "no site lies between input and output"
    return f"they agree up to the last site, {before.site!r} ({before.sqnr:.1f} dB), and part behind it"


def agreements(model: QuantizedModel, path: Path, inputs: ModelInputs) -> list[Agreement]:
    """Agreement at every site of an activation that the file stores codes of, in order of execution."""
    onnx_model = onnx.load(path)
    codes = {node.name.rpartition("/")[0]: node for node in onnx_model.graph.node if _quantizes(node)}
    order = {name: index for index, name in enumerate(codes)}
    names = sorted((name for name in model.sites if name in codes), key=order.__getitem__)
    count = len(onnx_model.graph.output)
    for name in names:
        value = codes[name].output[0]
        onnx_model.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    with tempfile.TemporaryDirectory() as directory:
        watched = Path(directory) / "watched.onnx"
        onnx.save(onnx_model, watched, save_as_external_data=path.stat().st_size > 2**30)
        session = find_runtime(model.target.runtime).open(watched, None)
        stored = session.run([to_numpy(tensor) for tensor in tensors_of(inputs)])[count:]
    simulated = simulated_sites(model, names, inputs)
    result = []
    for name, array in zip(names, stored, strict=True):
        site = model.sites[name]
        scale, zero = (x.detach().cpu().double() for x in (site.scale, site.zero_point))
        if scale.dim() or name not in simulated:
            continue
        value = (torch.from_numpy(array.astype(np.int64)).double() - zero) * scale
        result.append(Agreement(name, signal_to_noise(simulated[name], value)))
    return result


def simulated_sites(
    model: QuantizedModel, names: Sequence[str], inputs: ModelInputs
) -> dict[str, torch.Tensor]:
    """What the simulation has at sites, the first time that it comes there."""
    seen: dict[str, torch.Tensor] = {}
    with _watching({model.sites[name]: name for name in names}, seen), model.using(Mode.QUANTIZE):
        args, kwargs = call_arguments(inputs)
        with torch.no_grad():
            model(*args, **kwargs)
    return seen


@contextmanager
def _watching(modules: dict[FakeQuantize, str], seen: dict[str, torch.Tensor]) -> Iterator[None]:
    def keep(module: Any, _: Any, output: torch.Tensor) -> None:
        seen.setdefault(modules[module], output.detach().cpu().double())

    handles: list[RemovableHandle] = [module.register_forward_hook(keep) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _quantizes(node: onnx.NodeProto) -> bool:
    return node.op_type == "QuantizeLinear" and ":" not in node.name.rpartition("/")[2]
