"""A small network with every kind of weight, and how to quantize and run it."""

import torch
from torch import nn

import halfstep as hs
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel, inspect_kernels

TOKENS = torch.arange(28).reshape(4, 7)


class Mixed(nn.Module):
    """Embedding, linear on sequences with and without bias, product by a parameter, conv, linear on vectors."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.table = nn.Embedding(100, width)
        self.first, self.second = nn.Linear(width, 96), nn.Linear(width, 96, bias=False)
        self.factor = nn.Parameter(torch.randn(96, 64) / 8)
        self.conv, self.head = nn.Conv1d(7, 8, 3), nn.Linear(8 * 62, 10)

    def forward(self, tokens):
        x = self.table(tokens)
        x = torch.tanh(self.first(x)) + self.second(x)
        return self.head(torch.relu(self.conv(x @ self.factor)).flatten(1))


def build(seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    return Mixed().eval()


def quantized(
    recipe: hs.Recipe, model: nn.Module | None = None, inputs: torch.Tensor = TOKENS
) -> hs.QuantizedModel:
    q = hs.prepare(model or build(), inputs, recipe=recipe)
    hs.observe(q, [inputs])
    hs.calibrate(q)
    return q


def deployed(q: hs.QuantizedModel, path, inputs: torch.Tensor = TOKENS):
    """The file's operator counts on ONNX Runtime, and how far it and the simulation agree in dB."""
    hs.export_onnx(q, path)
    with q.using(Mode.QUANTIZE):
        parity = compare(q, DeployedModel(path, q.captured.in_spec, q.captured.out_spec), [inputs])
    return inspect_kernels(path).counts, parity.sqnr
