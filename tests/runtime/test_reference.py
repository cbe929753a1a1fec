"""Files for hardware that is not here: executed as written."""

import onnx
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.runtime.deployed import inspect_kernels, runtime_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        y = F.relu(self.a(x))
        y = self.up(y).flatten(2).transpose(1, 2)
        return self.fc(self.norm(y)) @ y[:, :4].transpose(1, 2)[:, :4]


def test_tensorrt_file(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    q = hs.prepare(Net().eval(), x, target="tensorrt", recipe=hs.Recipe.int8().override("fc", None))
    hs.observe(q, [x])
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    assert runtime_of(path).name == "reference"
    kernels = inspect_kernels(path)
    assert kernels.integer == ("a/Conv", "up/ConvTranspose", "matmul/MatMul")
    assert kernels.floating == ("fc/MatMul",)
    proof = hs.verify(path, q, [x], rounds=3)
    assert proof.parity.sqnr > 60  # nothing is computed otherwise than in the simulation
    assert proof.integer_layers == 3

    graph = onnx.load(path).graph
    tensors = {t.name: t for t in graph.initializer}
    zeros = [onnx.numpy_helper.to_array(t) for name, t in tensors.items() if name.endswith("zero_point")]
    assert all(zero.dtype == "int8" and not zero.any() for zero in zeros)
    assert not any(t.data_type == onnx.TensorProto.INT32 for t in tensors.values())  # biases stay float
    assert not any(node.op_type == "Clip" for node in graph.node)  # 8 bits end where int8 does
    assert sum(node.op_type == "Relu" for node in graph.node) == 1  # zero point 0 does not stand for it
