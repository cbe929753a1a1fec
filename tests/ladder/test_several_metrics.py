"""A climb that must keep to the targets of several metrics at once."""

import json

import pytest
import torch
from climbing import data, network

import halfstep as hs
from halfstep.cli.console import summary
from halfstep.errors import ArgumentError, RunError
from halfstep.evaluate import Several
from halfstep.report.page import page
from halfstep.report.run import Run

INPUTS, LABELS = data()
LABELLED = [(INPUTS, LABELS)]


def worst_class(model):
    """The smallest share of hits in a class."""
    with torch.no_grad():
        hits = (model(INPUTS).argmax(1) == LABELS).double()
    return min(float(hits[label == LABELS].mean()) for label in LABELS.unique())


def climb(folder=None, second=worst_class, name="worst class", **options):
    settings = {"recipe": hs.Recipe.uniform(3, 3), "max_drop": 0.5, "threads": 1, "rungs": ("ptq", "partial")}
    torch.set_num_threads(1)
    return hs.quantize(
        network(),
        INPUTS[:4],
        calibration=list(data(2)[0].split(32)),
        metric={"accuracy": hs.Accuracy(LABELLED), name: second},
        directory=folder,
        **settings | options,
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The accuracy may fall by half, the worst class not at all: only the second one sends the climb on."""
    folder = tmp_path_factory.mktemp("several") / "run"
    return climb(folder, floor={"worst class": 1.0})


def test_the_climb_goes_on_until_every_metric_keeps_to_its_target(outcome):
    assert [step.rung for step in outcome.path] == ["ptq", "partial"]
    accuracy, worst = outcome.path[0].metrics
    assert accuracy.met and not worst.met and not outcome.path[0].met
    assert all(standing.met for standing in outcome.path[1].metrics) and outcome.path[1].met


def test_the_outcome_has_every_metric_of_the_file(outcome):
    accuracy, worst = outcome.metrics
    assert (accuracy.metric, worst.metric) == ("accuracy", "worst class")
    assert accuracy.score == outcome.deployed_score and accuracy.max_drop == outcome.max_drop == 0.5
    assert worst.float_score == 1 and worst.low is None and accuracy.low is not None
    assert outcome.met == (accuracy.met and worst.met)
    assert f"; worst class {worst}" in repr(outcome) and str(worst) in outcome._repr_html_()
    saved = json.loads((outcome.directory / "outcome.json").read_text())
    assert [metric["score"] for metric in saved["metrics"]] == [accuracy.score, worst.score]


def test_sentences_and_report_name_each(outcome):
    named = [s for s in outcome.decisions if "accuracy" in s and "and worst class" in s]
    assert any(sentence.startswith("PTQ with ") for sentence in named)
    text = page(Run.read(outcome.directory))
    assert ">every metric</caption>" in text
    for step in outcome.path:
        assert f'data-figure="step {step.rung} worst class" data-value="{step.metrics[1].score!r}"' in text
    assert "accuracy Accuracy, worst class CallableMetric" in text
    assert "worst class" in list(summary(outcome).columns[0].cells)


def test_the_same_call_again_evaluates_nothing_and_another_metric_is_refused(outcome, monkeypatch):
    evaluate, scored = Several.evaluate, []
    with monkeypatch.context() as patch:
        patch.setattr(
            Several, "evaluate", lambda self, model: (scored.append(model), evaluate(self, model))[1]
        )
        again = climb(outcome.directory, floor={"worst class": 1.0})
    assert [type(model) for model in scored] == [hs.QuantizedModel]  # float, since one of them is a function
    assert again.metrics == outcome.metrics and again.evaluations == outcome.evaluations
    with pytest.raises(RunError, match="belongs to a run with another metric;"):
        climb(outcome.directory, second=noise, floor={"worst class": 1.0})


def test_advice_names_the_metric_that_is_missed():
    outcome = climb(
        name="loss",
        second=hs.CallableMetric(noise, False),
        max_drop={"accuracy": 0.9, "loss": 0.0},
        rungs=("ptq",),
    )
    assert not outcome.met
    missed = outcome.metrics[1]
    assert outcome.advice[-1] == f"A max_drop of {missed.drop:.4g} for loss would be met by what was found"


def noise(model):
    """Mean squared difference from float; 0 for float alone."""
    with torch.no_grad():
        return float((model(INPUTS) - network()(INPUTS)).square().mean())


def test_a_target_of_no_metric_is_refused_before_anything_is_evaluated():
    def never(model):
        raise AssertionError("evaluated")

    with pytest.raises(
        ArgumentError, match=r"floor: got the name 'worst', needed one of 'accuracy', 'worst class'"
    ):
        climb(second=never, floor={"worst": 0.5})


def test_steps_taken_alone_take_several_metrics_too():
    q = hs.prepare(network(), INPUTS[:4], hs.Recipe.uniform(3, 3))
    hs.observe(q, list(data(2)[0].split(32)))
    hs.calibrate(q)
    metrics = {"accuracy": hs.Accuracy(LABELLED), "worst class": worst_class}
    found = hs.partial(q, metrics, max_drop={"accuracy": 0.5, "worst class": 0.0})
    assert found.met and worst_class(q) == 1
