"""Recurrent layers over sequences of any length: traced as one operator, written to a file that takes any."""

import pytest
import torch
from torch import nn
from torch._decomp import decomposition_table

import halfstep as hs
from halfstep.errors import CaptureError
from halfstep.fidelity.compare import compare
from halfstep.graph.capture import capture
from halfstep.graph.recurrences import recurrences_whole
from halfstep.runtime.deployed import DeployedModel

TIME = {"x": {1: "time"}}


class Reader(nn.Module):
    """A recurrent layer between two linear ones; with what it ends in."""

    def __init__(self, kind, **options):
        super().__init__()
        self.enter, self.layer = nn.Linear(6, 8), kind(8, 8, batch_first=True, **options)
        self.leave = nn.LazyLinear(3)
        self.eval()(torch.zeros(2, 4, 6))

    def forward(self, x):
        y, state = self.layer(torch.relu(self.enter(x)))
        last = state[0] if isinstance(state, tuple) else state
        return self.leave(y), last


KINDS = [(nn.GRU, {}), (nn.LSTM, {"bidirectional": True, "num_layers": 2})]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_file_with_a_recurrent_layer_takes_sequences_of_any_length(kind, options, tmp_path):
    torch.manual_seed(0)
    model, batches = Reader(kind, **options), [torch.randn(3, length, 6) for length in (5, 9)]
    q = hs.prepare(model, batches[0], dynamic=TIME)
    assert sum("aten." in str(n.target) and ".input" in str(n.target) for n in q.graph.nodes) == 1
    hs.observe(q, batches)
    hs.calibrate(q)
    file = DeployedModel(hs.export_onnx(q, tmp_path / "q.onnx"), q.captured.in_spec, q.captured.out_spec)
    assert compare(q, file, [torch.randn(2, 17, 6)]).sqnr > 60


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_an_lstm_with_projections_is_refused_by_name():
    words = r"module 'layer' is an LSTM with projections \(proj_size=3\), which ONNX has no operator for; train it"
    with pytest.raises(CaptureError, match=words):
        capture(Reader(nn.LSTM, proj_size=3), torch.randn(2, 5, 6))


def test_shapes_are_those_that_the_layer_answers_with():
    model, x = Reader(nn.LSTM, bidirectional=True, num_layers=2), torch.randn(2, 5, 6)
    captured = capture(model, x, TIME)
    (node,) = (node for node in captured.graph.nodes if "lstm" in str(node.target))
    with torch.no_grad():
        entered = torch.relu(model.enter(x))
        outputs, (states, cells) = model.layer(entered)
    got = [
        [int(size.node.hint) if hasattr(size, "node") else size for size in v.shape] for v in node.meta["val"]
    ]
    assert got == [list(each.shape) for each in (outputs, states, cells)]


def test_torch_is_left_as_it_was():
    op = torch.ops.aten.gru.input
    before = dict(op.py_kernels), decomposition_table[op]
    with recurrences_whole():
        assert decomposition_table[op] is not before[1]
    assert (dict(op.py_kernels), decomposition_table[op]) == before
