"""Folding: the batch norm is gone and the outputs are what they were."""

import pytest
import torch
from torch import nn

import halfstep as hs
from bench.networks.resnet import randomize_batch_norm
from halfstep.errors import ArgumentError, ExportError
from halfstep.graph.capture import capture, relative_error
from halfstep.graph.fold import fold

aten = torch.ops.aten

CASES = {
    "conv1d": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (3, 8)),
    "conv2d": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (3, 8, 8)),
    "conv2d without bias": (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (3, 8, 8)),
    "batch norm without affine": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
        (3, 8, 8),
    ),
    "grouped": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), (4, 8, 8)),
    "same padding": (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)), (3, 8, 8)),
    "conv3d": (nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 4, 4, 4)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4)), (3, 4, 4)),
    "transposed in groups": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.BatchNorm2d(6)),
        (4, 4, 4),
    ),
    "linear": (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (5,)),
}


def batch_norms(captured):
    return [n for n in captured.graph.nodes if n.target is aten._native_batch_norm_legit_no_training.default]


@pytest.mark.parametrize("name", CASES)
def test_batch_norm_is_folded(name):
    model, shape = CASES[name]
    randomize_batch_norm(model).eval()
    x = torch.randn(5, *shape)
    captured = fold(capture(model, x))
    assert not batch_norms(captured)
    assert set(captured.module.state_dict()) == {"0.weight", "0.bias"}
    assert relative_error(captured(x), model(x)) < 1e-6


def test_a_batch_norm_over_a_sequence_is_kept():
    model = randomize_batch_norm(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(3))).eval()
    x = torch.randn(2, 3, 4)
    captured = fold(capture(model, x))
    assert len(batch_norms(captured)) == 1
    assert torch.equal(captured(x), model(x))


class Transposed(nn.Module):
    """A linear layer as GPT-2 writes them: its weight is (inputs, outputs)."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, 6), self.weight).relu()


def test_a_linear_layer_written_as_addmm_is_a_layer(tmp_path):
    torch.manual_seed(0)
    model, x = Transposed(), torch.randn(8, 6)
    q = hs.prepare(model, x)
    (layer,) = q.layers
    assert layer.operator.kind == "linear" and layer.operator.weight is not None
    hs.observe(q, [x])
    hs.calibrate(q)
    (fate,) = hs.verify(hs.export_onnx(q, tmp_path / "q.onnx"), q, [x], rounds=3).layers
    assert fate.integer
    with pytest.raises(ArgumentError, match="the graph was rewritten"):
        q.to_float_state_dict()


class SharedConv(nn.Module):
    """One conv called twice, each time with a batch norm of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn2(self.conv(torch.relu(self.bn1(self.conv(x)))))


class SharedBlock(nn.Module):
    """Conv and batch norm called twice together, and a conv whose weight is tied to the first's."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.tied = nn.Conv2d(3, 3, 3, padding=1)
        self.tied.weight = self.block[0].weight

    def forward(self, x):
        return self.tied(self.block(self.block(x)))


class TwoReaders(nn.Module):
    """A conv whose result is read beside its batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


@pytest.mark.parametrize(("module", "left"), [(SharedConv, 0), (SharedBlock, 0), (TwoReaders, 1)])
def test_shared_modules_and_tied_weights_stay_right(module, left):
    model = randomize_batch_norm(module()).eval()
    x = torch.randn(2, 3, 6, 6)
    captured = fold(capture(model, x))
    assert len(batch_norms(captured)) == left
    assert relative_error(captured(x), model(x)) < 1e-5


class OneHead(nn.Module):
    """Attention over (batch, tokens, channels)."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, mask=None, causal=False):
        q, k, v = self.into(x).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal))


class Causal(OneHead):
    def forward(self, x):
        return super().forward(x, causal=True)


class ItsOwnKeys(nn.Module):
    """The same values are queries and keys."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(16, 16)

    def forward(self, x):
        x = self.into(x)
        return nn.functional.scaled_dot_product_attention(x, x, x)


def masked(*shape):
    hidden = torch.zeros(*shape)
    hidden[..., 4:] = -torch.inf
    return hidden


class Learned(OneHead):
    """Queries without a batch."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 16))

    def forward(self, x):
        _, k, v = self.into(x).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(self.queries, k, v))


class OneMask(OneHead):
    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("mask", masked(*shape) if shape else torch.tensor(0.5))

    def forward(self, x):
        return super().forward(x, self.mask)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("model", "masks"),
    [
        (OneHead, ()),
        (OneHead, (masked(4, 6, 6),)),
        (OneHead, (masked(4, 1, 6),)),
        (Causal, ()),
        (ItsOwnKeys, ()),
        (Learned, ()),
        (OneMask, ()),
        (lambda: OneMask(6), ()),
        (lambda: OneMask(6, 6), ()),
    ],
)
def test_attention_without_heads_is_exported(model, masks, target, tmp_path):
    inputs = (torch.randn(4, 6, 16), *masks)
    q = hs.prepare(model().eval(), inputs, target=target)
    hs.observe(q, [inputs])
    hs.calibrate(q)
    proof = hs.verify(hs.export_onnx(q, tmp_path / "model.onnx"), q, [inputs])
    assert all(layer.integer for layer in proof.layers) and proof.parity.sqnr > 40


def test_attention_over_five_dimensions_is_refused_with_what_it_needs(tmp_path):
    q = hs.prepare(OneHead().eval(), torch.randn(4, 2, 2, 6, 16))
    with pytest.raises(ExportError, match=r"attention \(at 'attention'\) takes .*; reshape"):
        hs.export_float(q, tmp_path / "float.onnx")
