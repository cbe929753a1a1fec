"""Inputs of varying size: what is named, what the file then takes, and what is refused, with the place."""

import onnx
import pytest
import torch
from torch import nn

import halfstep as hs
from bench.networks.unet import UNet
from halfstep.errors import ArgumentError, CaptureError, DataError
from halfstep.fidelity.compare import compare
from halfstep.graph.capture import capture
from halfstep.runtime.deployed import DeployedModel

TOKENS = {"ids": {1: "tokens"}, "mask": {1: "tokens"}}


class Text(nn.Module):
    """A transformer layer over tokens with padding, of at most ``longest``."""

    def __init__(self, width=16, longest=24):
        super().__init__()
        self.words, self.places = nn.Embedding(50, width), nn.Parameter(torch.randn(longest, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, ids, mask):
        x = self.layer(self.words(ids) + self.places[: ids.shape[1]], src_key_padding_mask=mask == 0)
        kept = mask[..., None].to(x.dtype)
        return self.head((x * kept).sum(1) / kept.sum(1))


def text(batch, tokens, padded=2):
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, tokens - padded :] = 0
    return {"ids": torch.randint(0, 50, (batch, tokens)), "mask": mask}


class Fixed(nn.Module):
    """Writes the number of tokens down."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        y = self.inner(x)
        return y.reshape(x.shape[0], 6 * 4).sum(1)


def sizes(values):
    return [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values]


@pytest.fixture(scope="module")
def text_model():
    torch.manual_seed(0)
    return Text().eval()


def test_a_quantized_file_takes_texts_of_any_length(text_model, tmp_path):
    q = hs.prepare(text_model, text(2, 8), dynamic=TOKENS)
    hs.observe(q, [text(4, tokens) for tokens in (5, 9, 17)])
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    graph = onnx.load(path).graph
    assert sizes(graph.input) == [["batch", "tokens"], ["batch", "tokens"]]
    assert sizes(graph.output) == [["batch", 3]]
    deployed = DeployedModel(path, q.captured.in_spec, q.captured.out_spec)
    for tokens in (3, 8, 24):
        assert compare(q, deployed, [text(3, tokens)]).sqnr > 60


def test_a_second_example_says_what_may_vary(text_model):
    axes = capture(text_model, text(2, 8), text(3, 11)).axes
    assert set(axes.names.values()) == {"ids_1"}
    with pytest.raises(ArgumentError, match="another structure than example_inputs"):
        capture(text_model, text(2, 8), torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match="sizes 8 and 1, needed at least 2 in both"):
        capture(text_model, text(2, 8), text(3, 1))


def test_images_of_two_sizes(tmp_path):
    torch.manual_seed(0)
    images = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 24, 40)]
    q = hs.prepare(UNet(width=4).eval(), images[0], dynamic={"x": {2: "height", 3: "width"}})
    hs.observe(q, images)
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    assert sizes(onnx.load(path).graph.input) == [["batch", 3, "height", "width"]]
    deployed = DeployedModel(path, q.captured.in_spec, q.captured.out_spec)
    assert compare(q, deployed, [torch.randn(1, 3, 48, 16)]).sqnr > 60
    with pytest.raises(DataError, match=r"needed \(batch, 3, height, width\) with height at least 4"):
        q(torch.randn(1, 3, 2, 32))


def test_inputs_that_do_not_fit_are_named(text_model):
    q = hs.prepare(text_model, text(2, 8), dynamic=TOKENS)
    with pytest.raises(
        DataError, match=r"'mask': got shape \(2, 6\), needed \(batch, tokens\) with tokens = 7 as in"
    ):
        q(**{**text(2, 7), "mask": torch.ones(2, 6, dtype=torch.long)})
    with pytest.raises(DataError, match="with tokens at most 24, for which the model's code was traced"):
        q(**text(2, 25))
    with pytest.raises(DataError, match=r"'ids': got shape \(2, 7\), needed \(batch, 8\)"):
        hs.prepare(text_model, text(2, 8))(**text(2, 7))


def test_code_that_fixes_a_size_is_shown():
    line = Fixed.forward.__code__.co_firstlineno + 2
    with pytest.raises(CaptureError) as caught:
        capture(Fixed(), torch.randn(2, 6, 4), {"x": {1: "tokens"}})
    message = str(caught.value)
    assert "fixes dimension 1 of input 'x', which is to vary, at the example's 6: module 'Fixed'" in message
    assert f"{__file__}:{line}; take it from x.shape[1] there, or leave it out" in message


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"word": {1: "tokens"}}, "got input 'word', needed one of 'ids', 'mask'"),
        ({"ids": {2: "tokens"}}, "input 'ids': got dimension 2, needed 0 to 1"),
        ({"ids": {1: "my tokens"}}, "got 'my tokens', needed a name"),
        ({"ids": {0: "n", 1: "n"}}, "'n' is one size, but the example inputs have 2 in 'ids' and 8 in 'ids'"),
    ],
)
def test_what_dynamic_cannot_be(text_model, dynamic, message):
    with pytest.raises(ArgumentError, match=message):
        capture(text_model, text(2, 8), dynamic)


def test_two_names_for_one_size_are_refused(text_model):
    with pytest.raises(CaptureError, match=r"'tokens' and 'others' .* always have the same size"):
        capture(text_model, text(2, 8), {"ids": {1: "tokens"}, "mask": {1: "others"}})
