"""Speed as a goal beside accuracy: what is chosen, what is said, and what cannot be asked."""

import json

import pytest

import halfstep as hs
from halfstep.errors import ArgumentError
from halfstep.ladder import costs, pace
from tests.ladder.climbing import data, network


@pytest.fixture
def clock(monkeypatch):
    """Files with layers in float are too slow; none is faster with a layer in float."""
    asked = []

    def speed(search, file, float_file, threads):
        assert file().exists()
        asked.append(len(search.model.float_layers))
        return 0.0 if search.model.float_layers else 3.0

    monkeypatch.setattr(pace, "file_speed", speed)
    monkeypatch.setattr(costs, "microseconds", lambda model, groups, *rest: [1.0 for _ in groups])
    return asked


def test_the_most_accurate_of_the_fast_ones_is_taken_and_the_rest_is_said(tmp_path, clock):
    inputs, labels = data()
    outcome = hs.quantize(
        network(),
        inputs[:4],
        calibration=[data(2)[0]],
        metric=hs.Accuracy([(inputs, labels)]),
        recipe=hs.Recipe.uniform(2, 2, ends=None),
        directory=tmp_path,
        max_drop=0.12,
        threads=1,
        latency=1e-6,
        max_float=1.0,
        progress=False,
    )
    assert [step.rung for step in outcome.path] == ["ptq", "partial"]
    assert outcome.path[1].met
    assert not outcome.float_layers
    assert outcome.rung == "ptq"
    assert not outcome.met  # the fast one misses the accuracy
    (sentence,) = [said for said in outcome.decisions if "times as fast as float is asked for" in said]
    assert "0.00x" in sentence and "3.00x" in sentence
    assert sentence.endswith("is the most accurate that is fast enough")
    files = json.loads((tmp_path / "outcome.json").read_text())
    assert files["latency"] == 1e-6
    end = [entry.data for entry in outcome.entries if entry.kind == "outcome"][-1]
    assert {point["name"] for point in end["measured"]["files"]} == {"float", "final file", "partial"}
    (base,) = (point["ms"] for point in end["measured"]["files"] if point["name"] == "float")
    late = [point for point in end["measured"]["files"] if point["name"] == "partial"]
    assert all(point["ms"] * point["speedup"] == pytest.approx(base) for point in late)  # of another race
    outcome.report(tmp_path / "report.html")
    assert ", asked 1e-06x" in (tmp_path / "report.html").read_text()


def test_a_file_that_is_not_fast_enough_misses_whatever_it_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "microseconds", lambda model, groups, *rest: [1.0 for _ in groups])
    inputs, labels = data()
    outcome = hs.quantize(
        network(),
        inputs[:4],
        calibration=[data(2)[0]],
        metric=hs.Accuracy([(inputs, labels)]),
        max_drop=0.5,
        threads=1,
        latency=1000,
        progress=False,
    )
    assert not outcome.met
    assert outcome.latency == 1000
    assert outcome.advice[0].startswith("The file is ")
    assert "times as fast as float, and 1000 were asked for" in outcome.advice[0]
    assert any("So none is fast enough" in said for said in outcome.decisions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": 0.0}, "latency: got 0.0, needed a number above 0, such as 2.0"),
        ({"latency": True}, "latency: got True, needed a number above 0"),
        ({"latency": 2.0, "target": "tensorrt"}, "files for tensorrt are not timed on its hardware here"),
    ],
)
def test_goals_that_cannot_be(options, message):
    inputs, labels = data()
    with pytest.raises(ArgumentError, match=message):
        hs.quantize(network(), inputs[:4], [inputs], hs.Accuracy([(inputs, labels)]), **options)
