import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.errors import FormatError
from halfstep.export import storage
from halfstep.export.storage import pack, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_comes_back(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.arange(low, low + 2**bits).repeat(3)[: 3 * 2**bits - 1].int()  # a length that fills no byte
    packed = pack(codes, bits)
    assert packed.shape == (-(-len(codes) * bits // 8),)
    assert torch.equal(unpack(packed, bits, codes.shape, signed).int(), codes)


@given(st.data())
def test_codes_come_back_and_sit_where_the_stream_says(data):
    bits = data.draw(st.integers(1, 8))
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=20))
    packed = pack(torch.tensor(codes, dtype=torch.int32), bits)
    stream = int.from_bytes(bytes(packed.tolist()), "little")
    assert stream == sum(code << (i * bits) for i, code in enumerate(codes))


@pytest.mark.parametrize(
    ("kind", "bits", "signed"),
    [
        (onnx.TensorProto.INT4, 4, True),
        (onnx.TensorProto.UINT4, 4, False),
        (onnx.TensorProto.INT2, 2, True),
        (onnx.TensorProto.UINT2, 2, False),
        (onnx.TensorProto.FLOAT4E2M1, 4, False),
    ],
)
def test_the_layout_is_that_of_onnx(kind, bits, signed):
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    patterns = torch.arange(2**bits).repeat(2)[:-1]  # an odd length
    if kind == onnx.TensorProto.FLOAT4E2M1:
        array = patterns.numpy().astype(np.uint8).view(dtype)
    else:
        patterns = patterns - 2 ** (bits - 1) if signed else patterns
        array = patterns.numpy().astype(dtype)
    assert bytes(pack(patterns, bits).tolist()) == numpy_helper.from_array(array).raw_data


def test_shapes_are_kept_and_nothing_packs_to_nothing():
    codes = torch.randint(0, 4, (3, 5, 2))
    assert torch.equal(unpack(pack(codes, 2), 2, (3, 5, 2), signed=False).long(), codes)
    assert pack(torch.zeros(0, dtype=torch.int8), 4).shape == (0,)
    assert unpack(torch.zeros(0, dtype=torch.uint8), 4, (0,), signed=True).shape == (0,)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_blocks_join_without_a_seam(monkeypatch, bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(low, low + 2**bits, (1001,), generator=torch.Generator().manual_seed(bits))
    whole = pack(codes, bits)
    monkeypatch.setattr(storage, "BLOCK", 16)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, (1001,), signed).long(), codes)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.found = max(self.found, result.nbytes)
        return result


@pytest.mark.parametrize("bits", [4, 7])
def test_memory_is_bounded(bits):
    codes = torch.zeros(32 * storage.BLOCK, dtype=torch.int8)
    with Largest() as making:
        packed = pack(codes, bits)
    assert making.found == packed.nbytes
    with Largest() as unmaking:
        unpack(packed, bits, codes.shape, signed=True)
    assert unmaking.found == codes.nbytes


@pytest.mark.parametrize("code", [2**32 + 1, -(2**32), 2**63 - 1, 256])
def test_codes_are_compared_before_they_are_narrowed(code):
    with pytest.raises(FormatError, match=rf"codes: got 0 to {code}|codes: got {code} to 0"):
        pack(torch.tensor([0, code]), 4)


def test_bad_input():
    with pytest.raises(FormatError, match="bits: got 9, needed 1 to 8"):
        pack(torch.zeros(3, dtype=torch.int8), 9)
    with pytest.raises(FormatError, match=r"codes: got torch.float32, needed integers"):
        pack(torch.zeros(3), 4)
    with pytest.raises(FormatError, match="codes: got 0 to 16, needed -8 to 15 for 4 bits"):
        pack(torch.tensor([0, 16]), 4)
    with pytest.raises(FormatError, match=r"needed uint8 of shape \(2,\) for 3 codes of 4 bits"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, (3,), signed=True)
