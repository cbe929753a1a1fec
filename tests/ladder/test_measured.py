"""Times kept in the journal: the same question is answered from it, any other one is measured anew."""

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.evaluate import Score, as_scorer
from halfstep.graph.layer_precision import LayerPrecision
from halfstep.journal import Journal
from halfstep.ladder import costs
from halfstep.ladder.costs import Tuning, file_times, group_times, tuned
from halfstep.ladder.goal import Goal
from halfstep.ladder.search import Search
from halfstep.precision import groups_of


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    q = hs.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6))
    hs.observe(q, [torch.randn(32, 6)])
    hs.calibrate(q)
    return q


@pytest.fixture
def model(calibrated):
    yield calibrated
    calibrated.float_layers = []


@pytest.fixture
def asked(monkeypatch):
    """What was really measured; every answer is another one."""
    asked = []

    def microseconds(model, groups, threads):
        asked.append("groups")
        return [float(len(asked))] * len(groups)

    def race_choices(model, choices, threads):
        asked.append("files")
        return [float(len(asked))] * len(choices)

    def tune(model, threads, among):
        asked.append("tuning")
        model.float_layers = ["2"]
        return Tuning(("2",), float(len(asked)), 2)

    monkeypatch.setattr(costs, "microseconds", microseconds)
    monkeypatch.setattr(costs, "race_choices", race_choices)
    monkeypatch.setattr(costs, "tune", tune)
    return asked


def begin(model, journal):
    return Search(model, as_scorer(lambda model: 1.0), Goal(0.01, Score(1.0)), journal=journal)


def every(search, threads=1):
    groups = groups_of(search.model)
    times = group_times(search, groups, threads)
    files = file_times(search, [LayerPrecision(), LayerPrecision.of(float={"0"})], threads)
    found = tuned(search, threads)
    assert search.model.float_layers == {"2"}
    search.model.float_layers = []
    return times, files, found


def test_the_same_is_measured_once(model, asked, tmp_path):
    with Journal(tmp_path) as journal:
        first = every(begin(model, journal))
        assert every(begin(model, journal)) == first
    with Journal(tmp_path) as journal:  # in another process
        assert every(begin(model, journal)) == first
    assert asked == ["groups", "files", "tuning"]


def test_other_threads_are_another_question(model, asked, tmp_path):
    with Journal(tmp_path) as journal:
        every(begin(model, journal), threads=1)
        every(begin(model, journal), threads=2)
        every(begin(model, journal), threads=None)
    assert asked == 3 * ["groups", "files", "tuning"]


def test_another_machine_is_another_question(model, asked, tmp_path, monkeypatch):
    with Journal(tmp_path) as journal:
        every(begin(model, journal))
        for name, value in (("processor", "another"), ("cores", "999"), ("onnxruntime", "0.0")):
            machine = {**costs.machine(), name: value}
            with monkeypatch.context() as patched:
                patched.setattr(costs, "machine", lambda machine=machine: machine)
                every(begin(model, journal))
    assert asked == 4 * ["groups", "files", "tuning"]


def test_another_candidate_is_another_question(model, asked, tmp_path):
    with Journal(tmp_path) as journal:
        search = begin(model, journal)
        every(search)
        site = model.sites["0.weight"]
        scale = site.scale.clone()
        site.scale.mul_(1.5)
        try:
            every(search)
        finally:
            site.scale.copy_(scale)
        model.float_layers = ["0"]
        tuned(search, 1)
        model.float_layers = []
        tuned(search, 1, among={"2"})
    assert asked == [*2 * ["groups", "files", "tuning"], "tuning", "tuning"]


def test_what_is_asked_of_names_the_groups_and_the_files(model, asked):
    search = begin(model, Journal())
    groups = groups_of(model)
    assert group_times(search, groups, 1) == [1.0, 1.0]
    assert group_times(search, groups[:1], 1) == [2.0]
    floats = LayerPrecision.of(float={"0"})
    assert file_times(search, [LayerPrecision(), floats], 1) == [3.0, 3.0]
    assert file_times(search, [floats, LayerPrecision()], 1) == [4.0, 4.0]
    assert group_times(search, groups, 1) == [1.0, 1.0]
