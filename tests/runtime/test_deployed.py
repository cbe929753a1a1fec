"""The deployed file behind the face of a module, and how it is compared with others."""

import math

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.fidelity.compare import compare, signal_to_noise
from halfstep.runtime.deployed import DeployedModel
from tests.export.mixed_network import quantized

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Answers(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.fc, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x):
        return self.wrap(self.fc(x))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    path = tmp_path_factory.mktemp("deployed") / "model.onnx"

    def make(wrap):
        q = quantized(hs.Recipe.int8(), Answers(wrap).eval(), X)
        return q, DeployedModel(hs.export_onnx(q, path), q.captured.in_spec, q.captured.out_spec)

    return make


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, None),
        lambda y: (None, y, [y.argmax(1), None]),
        lambda y: {"logits": y, "loss": None, "kind": "linear"},
    ],
)
def test_outputs_without_tensors_come_back_too(deployed, wrap):
    q, file = deployed(wrap)
    got, wanted = file(X), q(X)
    assert compare(q, file, [X]).sqnr > 35
    tensors = [type(leaf) for leaf in torch.utils._pytree.tree_leaves(got)]
    assert tensors == [type(leaf) for leaf in torch.utils._pytree.tree_leaves(wanted)]
    assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(wanted)


def test_code_written_for_the_users_model_finds_what_it_asks_for(deployed):
    q, file = deployed(lambda y: y)
    for model in (q, file):
        assert next(model.parameters()).device == model.device == torch.device("cpu")
        assert model.eval() is model
        assert model.train() is model
        assert model.to("cpu") is model
        with torch.no_grad():
            assert model(X.to(model.device)).device == model.device


def test_a_metric_of_the_model_s_device_scores_the_file():
    torch.manual_seed(0)
    model = Answers(lambda y: (y, None)).eval()
    x = torch.randn(64, 4)
    labels = model(x)[0].argmax(1)

    def accuracy(model):
        model.eval()
        device = next(model.parameters()).device
        return (model(x.to(device))[0].argmax(1) == labels.to(device)).float().mean().item()

    outcome = hs.quantize(model, x[:4], [x], accuracy, max_drop=0.1, rungs=["ptq"], threads=1)
    assert outcome.met


def test_infinite_noise_is_no_agreement_at_all():
    assert signal_to_noise(torch.ones(2), torch.tensor([1.0, math.inf])) == -math.inf
    assert signal_to_noise(torch.ones(2), torch.ones(2)) == math.inf
