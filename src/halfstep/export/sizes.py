"""What each weight takes in the file: codes, scales, and the operators that unpack them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from halfstep.model import QuantizedModel


def stored_bytes(model: QuantizedModel) -> dict[str, int]:
    """The bytes that each quantized weight takes in the file of ``model`` as it stands, by the weight's name.

    The file is built in memory and every initializer, operator and shape that belongs to a weight counted as it is
    stored: codes that the target's runtime has no narrow type for in a wider one, small weights unpacked, the operators
    that unpack the others with their names. What all weights share, such as tables of a few bytes, is nobody's.

    Args:
        model: calibrated; its mode does not matter.

    Raises:
        ExportError: if a weight has no range, or the network cannot be written.
    """
    from halfstep.export.build import build_quantized  # onnx loads when it is needed

    names = [site.name for site in model.placement.sites if site.is_weight]
    counted = dict.fromkeys(names, 0)
    for name, size in _entries(build_quantized(model, {})):
        if (owner := _owner(name, counted)) is not None:
            counted[owner] += size
    return counted


def nominal_bytes(model: QuantizedModel) -> dict[str, int]:
    """The bytes that each quantized weight's codes would take if every one took the bits of its format."""
    return {
        site.name: -(-model.weight(site.name).numel() * site.format.bits // 8)
        for site in model.placement.sites
        if site.is_weight
    }


def _entries(onnx_model: object) -> Iterator[tuple[str, int]]:
    """The name and the size of all that the graph stores."""
    import onnx_ir as ir

    assert isinstance(onnx_model, ir.Model)
    for name, value in onnx_model.graph.initializers.items():
        tensor = value.const_value
        yield name, len(name) + (0 if tensor is None else tensor.nbytes)
    for node in onnx_model.graph:
        yield node.name or "", int(ir.to_proto(node).ByteSize())
        for value in node.outputs:
            if value.name and value.type is not None:
                yield value.name, int(ir.to_proto(value).ByteSize())


def _owner(name: str, weights: Mapping[str, int]) -> str | None:
    """The weight that an entry is called after: the longest of those whose name it begins with, up to a boundary."""
    for end in sorted((i for i, letter in enumerate(name) if letter in "_/"), reverse=True):
        if name[:end] in weights:
            return name[:end]
    return None
