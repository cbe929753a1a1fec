"""Capture: what goes in comes out, the user's model stays as it was, and errors name the place."""

import copy

import pytest
import torch
from torch import nn

from halfstep.errors import CaptureError, DataError
from halfstep.graph.capture import capture, relative_error


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        if y.sum() > 0:
            return y
        return -y


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.fc = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y = self.fc(x)
        y += x
        y.mul_(self.scale)
        return self.dropout(self.relu(y))


class TwoInTwoOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, a, b):
        return {"sum": self.fc(a + b), "difference": self.fc(a) - b}


def test_in_place_operators_and_dropout_give_the_models_own_outputs():
    model = InPlace().eval()
    x = torch.randn(3, 4)
    captured = capture(model, x)
    for batch in (3, 1, 7):
        x = torch.randn(batch, 4)
        assert torch.equal(captured(x), model(x))


def test_the_users_model_is_left_untouched():
    model = InPlace().train()
    before = copy.deepcopy(model.state_dict())
    capture(model, torch.randn(3, 4))
    assert model.training
    assert model.dropout.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parameters_keep_their_names():
    captured = capture(Wrapper(InPlace()), torch.randn(3, 4))
    assert set(captured.module.state_dict()) == {"inner.scale", "inner.fc.weight", "inner.fc.bias"}


def test_keyword_inputs_and_dict_outputs():
    model = TwoInTwoOut()
    inputs = {"a": torch.randn(2, 4), "b": torch.randn(2, 4)}
    got, wanted = capture(model, inputs)(**inputs), model(**inputs)
    assert list(got) == ["sum", "difference"]
    assert all(torch.equal(got[key], wanted[key]) for key in got)


def test_control_flow_on_data_names_module_and_line():
    with pytest.raises(CaptureError, match=r"module 'inner', .*test_capture\.py:\d+: .*torch\.where"):
        capture(Wrapper(Branching()), torch.randn(2, 4))


def test_a_batch_of_one_is_refused():
    with pytest.raises(CaptureError, match=r"got a batch of 1, needed at least 2"):
        capture(nn.Linear(4, 4), torch.randn(1, 4))


def test_parameters_that_are_not_finite_are_named():
    model = Wrapper(nn.Linear(4, 4))
    model.inner.weight.data[0, 0] = float("nan")
    with pytest.raises(CaptureError, match=r"'inner.weight': 1 of 16 values are NaN or infinite"):
        capture(model, torch.randn(2, 4))


def test_a_fixed_batch_size_is_explained():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 4)

    with pytest.raises(CaptureError, match=r"fixes the batch size"):
        capture(Fixed(), torch.randn(2, 4))


def test_a_random_model_is_told_from_a_wrong_capture():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(CaptureError, match=r"answers differently when asked twice"):
        capture(Noisy(), torch.randn(2, 4))


def test_inputs_without_tensors_are_refused():
    with pytest.raises(DataError, match=r"needed at least one tensor"):
        capture(nn.Identity(), ())


def test_wrong_shape_and_type_are_named():
    captured = capture(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(DataError, match=r"got shape \(2, 5\), needed \(batch, 4\)"):
        captured.check_inputs([torch.randn(2, 5)])
    with pytest.raises(DataError, match=r"got torch.float64, needed torch.float32"):
        captured.check_inputs([torch.randn(2, 4).double()])


def test_relative_error_of_equal_tensors_with_nan_is_zero():
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert relative_error(x, x.clone()) == 0.0
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")


class Added(nn.Module):
    def forward(self, x, table):
        return x + table.mean(0)


def test_examples_are_selected_by_what_was_captured_as_a_batch():
    captured = capture(Added(), (torch.randn(4, 3), torch.randn(7, 3)))
    x, table = torch.randn(7, 3), torch.randn(7, 3)  # as long as the batch, and none all the same
    chosen = captured.select((x, table), torch.tensor([0, 1, 0]))
    assert torch.equal(chosen[0], x[[0, 1, 0]])
    assert chosen[1] is table
