"""Codes of 1 to 8 bits as bytes and back, in the order in which ONNX stores its 2- and 4-bit types."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from halfstep.errors import FormatError

#: Codes that are packed or unpacked at once: what is made in between stays below some 10 MB. A multiple of 8, so that
#: every block begins with a byte.
BLOCK = 2**18


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the low ``bits`` bits of each code into bytes.

    Element i takes the bits ``i * bits`` and up of one stream that fills every byte from its lowest bit. For
    2 and 4 bits that is ONNX's layout (the first element in the low bits); 3-bit codes cross byte borders, 8
    codes in 3 bytes. The rest of the last byte is zero.

    Args:
        codes: integers, any shape, in row-major order; signed codes in two's complement.
        bits: 1 to 8.

    Returns:
        uint8, ``ceil(codes.numel() * bits / 8)`` bytes, one-dimensional.

    Raises:
        FormatError: codes that are no integers or do not fit, or another width.

    >>> pack(torch.tensor([1, -2, 3]), bits=4)
    tensor([225,   3], dtype=torch.uint8)

    Source: ONNX, "4 bit integer types", packing and unpacking.
    """
    _check_bits(bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise FormatError(f"codes: got {codes.dtype}, needed integers")
    flat = codes.reshape(-1)
    packed = torch.empty(-(-len(flat) * bits // 8), dtype=torch.uint8, device=codes.device)
    places, byte = _places(bits, codes.device), _places(8, codes.device)
    for start, block in zip(range(0, len(flat), BLOCK), flat.split(BLOCK), strict=False):
        _check_codes(block.long(), bits)  # before they are narrowed
        stream = ((block.to(torch.uint8).unsqueeze(1) >> places) & 1).reshape(-1)  # (codes * bits,)
        stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
        first = start * bits // 8
        packed[first : first + len(stream)] = (stream << byte).sum(1, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int, shape: Sequence[int], signed: bool) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8, one-dimensional.
        bits: 1 to 8.
        shape: of the codes.
        signed: whether codes are two's complement.

    Returns:
        int8 if signed, else uint8, of ``shape``.

    Raises:
        FormatError: another width, or another number of bytes than ``shape`` needs.

    >>> unpack(torch.tensor([225, 3], dtype=torch.uint8), bits=4, shape=(3,), signed=True)
    tensor([ 1, -2,  3], dtype=torch.int8)
    """
    _check_bits(bits)
    count = prod(int(size) for size in shape)
    needed = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or packed.shape != (needed,):
        raise FormatError(
            f"packed: got {packed.dtype} of shape {tuple(packed.shape)}, needed uint8 of shape ({needed},) for "
            f"{count} codes of {bits} bits"
        )
    codes = torch.empty(count, dtype=torch.int8 if signed else torch.uint8, device=packed.device)
    places, byte = _places(bits, packed.device), _places(8, packed.device)
    for start in range(0, count, BLOCK):
        block = codes[start : start + BLOCK]
        first = start * bits // 8
        some = packed[first : first + -(-len(block) * bits // 8)]
        stream = ((some.unsqueeze(1) >> byte) & 1).reshape(-1)[: len(block) * bits].reshape(-1, bits)
        numbers = (stream << places).sum(1, dtype=torch.uint8)
        if signed:  # the sign's bit is repeated above it
            numbers = torch.where(numbers >= 2 ** (bits - 1), numbers | (256 - 2**bits), numbers)
        block.copy_(numbers.view(codes.dtype))
    return codes.reshape(tuple(shape))


def _places(bits: int, device: torch.device) -> Tensor:
    """Return how far each bit of a code is from the lowest."""
    return torch.arange(bits, dtype=torch.uint8, device=device)


def _check_codes(codes: Tensor, bits: int) -> None:
    """Raise unless codes, int64, fit in so many bits, signed or unsigned."""
    lowest, highest = -(2 ** (bits - 1)), 2**bits - 1
    low, high = map(int, torch.aminmax(codes))
    if not lowest <= low <= high <= highest:
        raise FormatError(f"codes: got {low} to {high}, needed {lowest} to {highest} for {bits} bits")


def _check_bits(bits: int) -> None:
    """Raise unless codes of this width are packed into bytes."""
    if not 1 <= bits <= 8:
        raise FormatError(f"bits: got {bits}, needed 1 to 8; wider codes are stored as they are")
