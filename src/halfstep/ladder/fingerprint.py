"""A name for what a model computes: the same for the same candidate, in this process and in a later one."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch

from halfstep.model import QuantizedModel


def fingerprint(model: QuantizedModel) -> str:
    """A digest of all that an evaluation of ``model`` depends on, besides the data.

    The graph, the layers in float, which sites take part with which format and range, the shifts and steps of biases,
    and every parameter. Two models that differ in none of these have the same fingerprint, however they came about.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    _add(digest, str(model.graph))
    for site in model.placement.sites:
        module = model.sites[site.name]
        readers = [[str(reader) for reader in position.readers] for position in site.positions]
        values = [str(position.value) for position in site.positions]
        _add(digest, (site.name, module.mode.value, site.format, repr(site.granularity), values, readers))
        _add(digest, module.state_dict())
    stretches = {bias.layer: bias.stretch for bias in model.placement.biases}
    for name, shift in model.shifts.items():
        _add(digest, (name, shift.active, stretches.get(name), shift.shift))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.startswith("quantizers."):
            _add(digest, (name, tensor))
    return digest.hexdigest()[:32]


def _add(digest: Any, value: Any) -> None:
    """Feed ``value`` to the digest, with its type and size, so that no two values look alike."""
    if isinstance(value, torch.Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif dataclasses.is_dataclass(value):
        _add(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, dict):
        _add(digest, [part for pair in value.items() for part in pair])
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)} ".encode())
        for part in value:
            _add(digest, part)
    else:
        text = repr(value).encode()
        digest.update(f"{type(value).__name__} {len(text)} ".encode() + text)
