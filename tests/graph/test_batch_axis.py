"""Networks whose batch is not the first dimension: time first, and states of (layers, batch, hidden)."""

import copy

import onnx
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.batches import InPieces
from halfstep.errors import ArgumentError, CaptureError, DataError
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import compare, error_power, halves, power
from halfstep.fidelity.fisher import fisher
from halfstep.fidelity.reference import Probe
from halfstep.graph.capture import capture
from halfstep.precision import groups_of
from halfstep.runtime.deployed import DeployedModel

BATCH = {"x": {0: "time", 1: "batch"}, "h": {1: "batch"}}


class Cell(nn.Module):
    """Layers of recurrence unrolled by nobody: each step's features and the mean of the state, time first."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x, h):
        y = torch.relu(self.into(x) + h.mean(0))
        return self.out(y), h + y.mean(0)


def inputs(batch=6, time=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(time, batch, 3, generator=generator), torch.randn(2, batch, 6, generator=generator)


@pytest.fixture(scope="module")
def q():
    torch.manual_seed(0)
    q = hs.prepare(Cell().eval(), inputs(), dynamic=BATCH)
    hs.observe(q, [inputs(9, 5, seed) for seed in range(4)])
    hs.calibrate(q)
    return q


def test_examples_are_taken_along_the_batch(q):
    captured = q.captured
    assert captured.batch_axes == (1, 1)
    assert captured.output_axes == (1, 1)
    assert captured.batch_size(inputs(9)) == 9
    part = captured.select(inputs(9), torch.tensor([8, 0]))
    torch.testing.assert_close(part[0], inputs(9)[0][:, [8, 0]])
    torch.testing.assert_close(part[1], inputs(9)[1][:, [8, 0]])
    assert sum(map(captured.batch_size, q.sample)) == 36
    first, second = halves(q, q.sample[:1])
    assert [captured.batch_size(half[0]) for half in (first, second)] == [4, 5]


def test_the_file_takes_any_batch_and_any_length(q, tmp_path):
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in onnx.load(path).graph.input
    ]
    assert shapes == [["time", "batch", 3], [2, "batch", 6]]
    deployed = DeployedModel(path, q.captured.in_spec, q.captured.out_spec)
    assert compare(q, deployed, [inputs(1, 7), inputs(4, 2)]).sqnr > 50
    with pytest.raises(DataError, match=r"'h': got shape \(2, 5, 6\), needed \(2, batch, 6\)"):
        q(inputs(4)[0], inputs(5)[1])


def test_pieces_are_put_together_along_the_batch(q):
    pieces = InPieces(q)
    batch = inputs(64, 3)
    wanted = q(*batch)
    with torch.no_grad():
        for got, whole in zip(pieces._in_pieces(batch, (16, 1)), wanted, strict=True):
            torch.testing.assert_close(got, whole)


def test_sensitivities_are_of_examples(q):
    """An example's errors are summed over its steps before they are squared: so this is the noise of the outputs."""
    probe = Probe(q, examples=8)
    assert probe.examples == 8
    scores = fisher(probe, groups_of(q), "sqnr", draws=400)
    with q.using(Mode.FLOAT), torch.no_grad():
        wanted = probe.replay.outputs(probe.replay.run(probe.batches[0]))
    noise = []
    for layer in ("into", "out"):
        twin = copy.deepcopy(q)
        twin.float_layers = [name for name in ("into", "out") if name != layer]
        with twin.using(Mode.QUANTIZE), torch.no_grad():
            noise.append(error_power(wanted, twin(*probe.batches[0])) / power(wanted))
    for score, measured in zip(scores, noise, strict=True):
        assert score == pytest.approx(measured, rel=0.5)


def test_a_whole_climb(tmp_path):
    labelled = [(inputs(32, 5, 9), torch.zeros(32))]

    def score(outputs, labels):
        return outputs[0].abs().mean((0, 2))

    torch.manual_seed(0)
    outcome = hs.quantize(
        Cell().eval(),
        inputs(),
        [inputs(256, 5, seed) for seed in range(2)],
        hs.Metric(labelled, score),
        max_drop=0.05,
        dynamic=BATCH,
        threads=1,
        progress=False,
    )
    assert outcome.met
    assert not any("are also among" in said for said in outcome.decisions)


def test_a_batch_that_is_named_apart_or_too_small_is_told():
    with pytest.raises(CaptureError, match=r"'batch' and 'other' .* always have the same size in this model"):
        capture(Cell(), inputs(), {"x": {1: "batch"}, "h": {1: "other"}})
    with pytest.raises(ArgumentError, match="'batch' is 1 in the example inputs, needed at least 2"):
        capture(Cell(), inputs(1), BATCH)
