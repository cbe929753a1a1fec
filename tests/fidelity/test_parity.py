"""How far two models agree, for every kind of output."""

import math

import pytest
import torch

from halfstep.errors import DataError
from halfstep.fidelity.compare import Parity, class_axis, compare, decibels, signal_to_noise

X = torch.arange(12.0).reshape(4, 3)


def parity(wanted, got, **options):
    return compare(lambda x: wanted, lambda x: got, [X], **options)


def test_classes_are_the_last_axis_and_in_maps_the_second():
    assert [class_axis(shape) for shape in ((8, 10), (8, 5, 10), (8, 21, 4, 4))] == [1, 2, 1]
    assert [class_axis(shape) for shape in ((8,), (8, 1), (8, 1, 4, 4), ())] == [None] * 4
    maps = torch.zeros(2, 3, 4, 4)
    maps[:, 1] = 1
    other = maps.clone()
    other[0, 2, 0, 0] = 2  # one pixel's class
    found = parity(maps, other)
    assert (found.top1, found.examples) == (31 / 32, 32)


def test_without_classes_there_is_no_answer_to_share():
    for found in (parity(X[:, :1], X[:, :1] + 0.1), parity(X, X + 0.1, classes=False)):
        assert (found.top1, found.examples) == (None, 0)
        assert found.reaches(15.0) and found.rows() == [
            ("outputs against the simulation's", f"{found.sqnr:.1f} dB")
        ]


def test_integers_alone_agree_where_they_are_equal():
    answers = torch.tensor([0, 1, 2, 1])
    found = parity(answers, torch.tensor([0, 1, 1, 1]))
    assert found == Parity(0.75, None, 4) and found.reaches(15.0)
    assert found.rows() == [("same answer as the simulation", "75.00% of 4")]
    assert not parity(answers, torch.tensor([1, 0, 1, 1])).reaches(15.0)


def test_of_several_outputs_the_first_floats_are_the_answer():
    outputs = {"classes": torch.tensor([2, 2, 2, 2]), "logits": X, "box": X / 7}
    found = parity(outputs, {**outputs, "box": X / 7 + 1e-3})
    assert found.top1 == 1 and 60 < found.sqnr < math.inf and not found.equal


def test_equal_outputs_are_said_to_be():
    found = parity(X, X.clone())
    assert found == Parity(1.0, math.inf, 4, equal=True) and found.reaches(15.0)
    assert found.rows()[1] == ("outputs against the simulation's", "equal to the last bit")
    again = Parity.of({"top1": 1.0, "sqnr": None, "examples": 4, "equal": True})
    assert again.rows() == found.rows()


def test_outputs_that_are_no_numbers_are_not_alike():
    broken = X.clone()
    broken[0, 0] = math.nan
    assert math.isnan(parity(X, broken).sqnr) and not parity(X, broken).reaches(15.0)
    broken[0, 0] = math.inf
    assert parity(X, broken).sqnr == -math.inf and not parity(X, broken).reaches(15.0)


def test_decibels():
    assert [decibels(100.0, 1.0), decibels(1.0, 0.0), decibels(0.0, 1.0)] == [20, math.inf, -math.inf]
    assert decibels(1.0, math.inf) == decibels(math.inf, math.inf) == -math.inf
    assert math.isnan(decibels(1.0, math.nan)) and math.isnan(decibels(math.nan, math.nan))
    assert signal_to_noise(torch.ones(2), torch.tensor([1.0, math.inf])) == -math.inf


def test_nothing_to_compare():
    with pytest.raises(DataError, match="parity: no batches to compare on"):
        compare(lambda x: x, lambda x: x, [])
    with pytest.raises(DataError, match="parity: the model returns no tensor"):
        parity(None, None)
