"""Outputs compared with the float network's, without labels."""

import math

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError, MetricError, NotObservedError
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Fidelity, Reference, divergences


def observed(model=None, batches=None, width=4):
    torch.manual_seed(0)
    q = hs.prepare(model or nn.Linear(width, 3).eval(), torch.randn(2, width))
    hs.observe(q, batches or [torch.randn(8, width), torch.randn(3, width)])
    return q


def test_the_divergence_is_that_of_the_definition():
    wanted, got = torch.randn(5, 7), torch.randn(5, 7)
    p, q = wanted.double().softmax(1), got.double().softmax(1)
    torch.testing.assert_close(divergences(wanted, got), (p * (p / q).log()).sum(1))


def test_masked_logits_have_no_say():
    wanted = torch.tensor([[0.0, 1.0, -math.inf]])
    got = torch.tensor([[0.0, 2.0, -math.inf]])
    assert divergences(wanted, got).item() == pytest.approx(divergences(wanted[:, :2], got[:, :2]).item())


def test_float_against_itself_is_equal_and_quantized_is_what_the_definitions_say():
    q = observed()
    reference = Reference(q)
    assert reference.compare(q) == Fidelity(0.0, math.inf)
    hs.calibrate(q)
    with torch.no_grad():
        got = torch.cat([q(x) for x in q.sample]).double()
        with q.using(Mode.FLOAT):
            wanted = torch.cat([q(x) for x in q.sample]).double()
    found = reference.compare(q)
    assert found.kl == pytest.approx(float(divergences(wanted, got).mean()), rel=1e-6)
    noise = float((wanted - got).square().sum() / wanted.square().sum())
    assert found.sqnr == pytest.approx(-10 * math.log10(noise), rel=1e-6)
    assert reference.passes == 3


class Classes(nn.Linear):
    """The classes alone, or what else is made of the outputs."""

    def __init__(self, make=lambda outputs: outputs.argmax(1)):
        super().__init__(4, 3)
        self.make = make

    def forward(self, x):
        return self.make(super().forward(x))


def test_integers_alone_are_compared_by_how_many_differ():
    q = observed(Classes())
    reference = Reference(q)
    assert not reference.has_classes and math.isinf(reference.compare(q).sqnr)
    hs.calibrate(q)
    q.weight("weight").data.neg_()
    with torch.no_grad():
        got = torch.cat([q(x) for x in q.sample])
        with q.using(Mode.FLOAT):
            q.weight("weight").data.neg_()
            wanted = torch.cat([q(x) for x in q.sample])
    q.weight("weight").data.neg_()
    different = int((wanted != got).sum())
    assert different and reference.compare(q).sqnr == pytest.approx(10 * math.log10(11 / different))
    assert [row.group.name for row in hs.sensitivity(q).rows] == ["linear"]


def test_what_is_shown_of_equal_outputs_and_of_those_without_classes():
    assert str(Fidelity(0.0, math.inf)) == "KL 0, equal outputs"
    assert str(Fidelity(math.nan, 20.0)) == "20.0 dB"
    assert Fidelity(math.nan, math.inf).figures() == ("–", "equal")
    assert Fidelity(0.25, 20.0).figures() == ("0.25", "20.0")


def test_no_more_examples_than_asked_even_within_a_batch():
    q = observed()
    assert Reference(q).examples == 11
    assert [len(batch) for batch in Reference(q, examples=9).batches] == [8, 1]
    assert [len(batch) for batch in Reference(q, examples=5).batches] == [5]


def test_an_answer_of_nan_is_the_worst():
    broken = Fidelity(math.nan, math.nan)
    assert broken.loss("kl") == broken.loss("sqnr") == math.inf
    assert Fidelity(0.1, 20.0).loss("kl") == 0.1
    assert Fidelity(0.1, 20.0).loss("sqnr") == -20.0


def test_what_cannot_be_compared():
    q = hs.prepare(nn.Linear(4, 1), torch.randn(2, 4))
    with pytest.raises(NotObservedError, match=r"no example was kept to compare outputs on; run observe\(\)"):
        Reference(q)
    hs.observe(q, [torch.randn(8, 4)])
    with pytest.raises(ArgumentError, match=r"examples: got 0, needed at least 1"):
        Reference(q, examples=0)
    reference = Reference(q)
    assert math.isnan(reference.compare(q).kl)
    with pytest.raises(ArgumentError, match=r"by: got 'kl' for outputs of shape \(8, 1\), needed logits"):
        reference.check("kl")
    with pytest.raises(ArgumentError, match=r"by: got 'cosine', needed 'kl' .* or 'sqnr'"):
        reference.check("cosine")
    reference.check("sqnr")
    with pytest.raises(MetricError, match=r"the model's outputs \(NoneType\) hold no tensor to compare"):
        Reference(observed(Classes(lambda outputs: None)))
