"""Layers left in float for speed at the end of a climb."""

import pytest

import halfstep as hs
from halfstep.ladder import costs as tuning
from tests.ladder.climbing import data, network


def climb(folder, **options):
    inputs, labels = data()
    return hs.quantize(
        network(),
        inputs[:4],
        calibration=[data(2)[0]],
        metric=hs.Accuracy([(inputs, labels)]),
        directory=folder,
        threads=1,
        tune=True,
        **options,
    )


@pytest.fixture
def clock(monkeypatch):
    """Says that integers lose a microsecond in the layers named, and gain one elsewhere."""
    slow, asked = set(), []

    def microseconds(model, groups, threads, rounds, batch, least=0.0):
        asked.append(len(groups))
        return [-1.0 if set(group.layers) <= slow else 1.0 for group in groups]

    monkeypatch.setattr(tuning, "microseconds", microseconds)
    return slow, asked


def test_what_loses_time_is_float_in_the_file_and_said(tmp_path, clock):
    slow, _ = clock
    slow.add("2")
    outcome = climb(tmp_path)
    assert outcome.met and outcome.rung == "ptq"
    assert outcome.float_layers == ("2",)
    assert "2" in [layer.name for layer in outcome.verification.layers if not layer.integer]
    assert any(s.startswith("left in float for speed: 2 (1 us less a batch): ") for s in outcome.decisions)


def test_a_resumed_run_takes_the_journals_word(tmp_path, clock):
    slow, asked = clock
    slow.add("2")
    first = climb(tmp_path)
    times = len(asked)
    slow.clear()
    again = climb(tmp_path)
    assert len(asked) == times
    assert again.float_layers == first.float_layers
    assert again.evaluations == first.evaluations


def test_nothing_changes_where_integers_win(tmp_path, clock):
    outcome = climb(tmp_path)
    assert outcome.float_layers == ()
    assert "no layer is left in float for speed: none of 3 groups is faster so" in outcome.decisions


def test_what_would_miss_the_target_is_put_back(tmp_path, clock, monkeypatch):
    """Float layers rarely lose accuracy, so the metric here dislikes them."""
    slow, _ = clock
    slow.add("2")
    inputs, labels = data()

    def score(model):
        floats = isinstance(model, hs.QuantizedModel) and bool(model.float_layers)
        return float((model(inputs).argmax(1) == labels).float().mean()) - 0.5 * floats

    outcome = hs.quantize(
        network(),
        inputs[:4],
        calibration=[data(2)[0]],
        metric=score,
        directory=tmp_path,
        threads=1,
        tune=True,
        rungs=["ptq"],
    )
    assert outcome.met and outcome.float_layers == ()
    assert any("and put back" in sentence for sentence in outcome.decisions)
