"""Layers left in float for speed: what is decided from what was measured."""

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError, NotObservedError
from halfstep.ladder import costs as tuning


@pytest.fixture
def model():
    torch.manual_seed(0)
    q = hs.prepare(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(4, 6),
    )
    hs.observe(q, [torch.randn(16, 6)])
    hs.calibrate(q)
    return q


def measured(monkeypatch, table, borders=0.0):
    """Let the clock say what ``table`` says of each layer, and ``borders`` of each border between float and not."""
    asked = []

    def microseconds(model, groups, threads, rounds, batch, least=0.0):
        asked.append([group.layers for group in groups])

        def cost(floats):
            inside = [name in floats for name in model.layer_names]
            crossed = sum(a != b for a, b in zip([False, *inside], [*inside, False], strict=True))
            return sum(table[name] for name in floats) + borders * (crossed if not all(inside) else 0)

        base = cost(model.float_layers)
        return [cost(model.float_layers | set(group.layers)) - base for group in groups]

    monkeypatch.setattr(tuning, "microseconds", microseconds)
    return asked


def test_nothing_is_left_in_float_where_integers_win(model, monkeypatch):
    measured(monkeypatch, {"0": 3.0, "2": 0.0, "4": 1.0})
    found = hs.tune(model)
    assert found == tuning.Tuning((), 0.0, 3)
    assert str(found) == "no layer is left in float for speed: none of 3 groups is faster so"
    assert model.float_layers == frozenset()


def test_all_that_lose_go_together_where_that_is_faster_still(model, monkeypatch):
    asked = measured(monkeypatch, {"0": -2.0, "2": 1.0, "4": -3.0})
    assert str(hs.tune(model)) == "left in float for speed: 0, 4 (5 us less a batch)"
    assert model.float_layers == {"0", "4"}
    assert asked[0] == [("0",), ("2",), ("4",)]
    # Then the two, the slowest alone, runs from either end of the network, and all of it.
    assert asked[1] == [("0", "4"), ("4",), ("0",), ("0", "2"), ("2", "4"), ("0", "2", "4")]
    assert asked[2:] == [[("2",)], [("2",)]]  # what is left is timed again


def test_the_best_alone_where_together_they_lose(model, monkeypatch):
    measured(monkeypatch, {"0": -2.0, "2": 9.0, "4": -4.0}, borders=1.0)
    assert hs.tune(model).float_layers == ("4",)
    assert model.float_layers == {"4"}


def test_a_run_of_layers_wins_where_each_of_them_alone_pays_for_its_borders(model, monkeypatch):
    measured(monkeypatch, {"0": -3.0, "2": -3.0, "4": 9.0}, borders=2.5)
    assert str(hs.tune(model)) == "left in float for speed: 0, 2 (1 us less a batch)"


def test_a_network_that_is_faster_in_float_stays_there_whole(model, monkeypatch):
    measured(monkeypatch, {"0": -1.0, "2": -1.0, "4": -1.0}, borders=5.0)
    assert hs.tune(model).float_layers == ("0", "2", "4")
    assert hs.tune(model) == tuning.Tuning((), 0.0, 0)  # nothing is left to ask about


@pytest.mark.slow
def test_it_runs_on_the_runtime_and_needs_an_example(model):
    before = model.float_layers
    found = hs.tune(model, threads=1, rounds=3, batch=40)  # more than the 16 examples that were seen
    assert found.tried == 3
    assert model.float_layers == before | set(found.float_layers)
    model.float_layers = []
    with pytest.raises(ArgumentError, match="batch: got 0, needed at least 1"):
        hs.tune(model, batch=0)
    model.sample = []
    with pytest.raises(NotObservedError, match="no example was kept to time"):
        hs.tune(model)
