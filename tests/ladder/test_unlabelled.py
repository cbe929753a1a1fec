"""Climbs for numbers of a whole set, and for nearness to the float model without labels."""

import warnings

import pytest
import torch
from climbing import data, network

import halfstep as hs
from halfstep.errors import RunError
from halfstep.evaluate import Several
from halfstep.ladder.float_score import float_evaluation
from halfstep.report.page import page
from halfstep.report.run import Run
from halfstep.runtime.deployed import DeployedModel

INPUTS, LABELS = data()
BATCHES = list(INPUTS.split(48))
CLASS = LABELS.mode().values
LABELLED = [(INPUTS[:64], LABELS[:64]), (INPUTS[64:], LABELS[64:])]


def counts(outputs, labels):
    said, is_so = outputs.argmax(1) == CLASS, labels == CLASS
    return torch.stack([said & is_so, said & ~is_so, ~said & is_so], 1).double()


def f1(rows):
    hits, false, missed = rows.sum(0)
    return float(2 * hits / (2 * hits + false + missed))


def climb(folder=None, metric=None, model=None, **options):
    settings = {"recipe": hs.Recipe.uniform(4, 4), "threads": 1, "rungs": ("ptq",), "progress": False}
    torch.set_num_threads(1)
    return hs.quantize(
        network() if model is None else model,
        INPUTS[:4],
        calibration=list(data(2)[0].split(32)),
        metric=metric,
        directory=folder,
        **settings | options,
    )


def four(inputs=BATCHES):
    return {
        "same": hs.Agreement(inputs),
        "angle": hs.Cosine(inputs),
        "noise": hs.SQNR(inputs),
        "f1": hs.SetMetric(LABELLED, counts, f1, resamples=200),
    }


TARGETS = {"max_drop": {"same": 0.3, "angle": 0.1, "f1": 0.3}, "floor": {"noise": 5}}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return climb(tmp_path_factory.mktemp("unlabelled") / "run", four(), **TARGETS)


def test_the_file_is_compared_with_the_users_float_model(outcome):
    assert outcome.met
    float_model = network()
    file = DeployedModel(outcome.directory / "model.onnx", threads=1)
    with torch.no_grad():
        wanted, got = float_model(INPUTS).double(), file(INPUTS).double()
    same, angle, noise, found = outcome.metrics
    assert same.score == outcome.deployed_score == float((wanted.argmax(1) == got.argmax(1)).double().mean())
    assert angle.score == pytest.approx(float(torch.nn.functional.cosine_similarity(wanted, got).mean()))
    ratio = wanted.square().sum() / (wanted - got).square().sum()
    assert noise.score == pytest.approx(float(10 * ratio.log10()), abs=1e-4)
    assert found.score == pytest.approx(f1(counts(got, LABELS)))
    assert (same.float_score, angle.float_score, found.float_score) == (1, 1, 1)
    assert noise.float_score == pytest.approx(144.494, abs=1e-3)


def test_intervals_are_in_the_outcome_and_the_report(outcome):
    for standing in outcome.metrics:
        assert (standing.low is None) == bool(standing.unsure)
    noise = outcome.metrics[2]
    assert noise.low < noise.drop < noise.high
    text = page(Run.read(outcome.directory))
    assert "same Agreement, angle Cosine, noise SQNR, f1 SetMetric" in text
    assert f"{noise.low:+.4f} to {noise.high:+.4f}" in text


def test_the_same_call_again_evaluates_nothing(outcome, monkeypatch):
    asked = []
    monkeypatch.setattr(Several, "evaluate", lambda *_: asked.append(1))
    cut = list(INPUTS.split(60))  # the same examples in other batches
    again = climb(outcome.directory, four(cut), **TARGETS)
    assert not asked and again.metrics == outcome.metrics


def test_other_inputs_statistics_and_selections_are_refused(outcome):
    with pytest.raises(RunError, match="belongs to a run with another labelled data"):
        climb(outcome.directory, four([INPUTS[:64]]), **TARGETS)
    for name, metric in (
        ("f1", hs.SetMetric(LABELLED, counts, lambda rows: 2 * f1(rows), resamples=200)),
        ("same", hs.Agreement(BATCHES, select=lambda out: out)),
    ):
        with pytest.raises(RunError, match="belongs to a run with another metric"):
            climb(outcome.directory, {**four(), name: metric}, **TARGETS)


class F1:
    """As torchmetrics' are."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.rows = torch.zeros(3, dtype=torch.float64)

    def update(self, preds, target):
        self.rows = self.rows + counts(preds, target).sum(0)

    def compute(self):
        return f1(self.rows[None])


def test_a_strict_climb_for_a_number_of_the_set_goes_on(tmp_path):
    metric = hs.SetMetric(LABELLED, F1(), resamples=200)
    recipe = hs.Recipe.uniform(3, 3)
    first = climb(tmp_path, metric, strict=True, max_drop=0.6, recipe=recipe)
    standing = first.metrics[0]
    assert standing.low < standing.drop < standing.high and first.met == (standing.high <= 0.6)
    again = climb(
        tmp_path, hs.SetMetric(LABELLED, F1(), resamples=200), strict=True, max_drop=0.6, recipe=recipe
    )
    assert again.metrics == first.metrics and again.evaluations == first.evaluations


def test_advice_names_the_floor_that_would_be_met():
    outcome = climb(metric=hs.SQNR(BATCHES), floor=100)
    assert not outcome.met
    assert outcome.advice[-1] == f"A floor of {outcome.deployed_score:.4g} would be met by what was found"


def test_a_shuffled_set_is_not_compared_in_pairs():
    class Shuffling:
        def __iter__(self):
            order = torch.randperm(128)
            yield INPUTS[order], LABELS[order]

    metric = hs.SetMetric(Shuffling(), lambda outputs, _: outputs.double(), torch.mean, resamples=200)
    q = hs.prepare(network(), INPUTS[:4])
    with pytest.warns(UserWarning, match="the scores of single examples differ between two evaluations"):
        score, _ = float_evaluation(metric, q)
    assert not score.paired


def calibrated():
    q = hs.prepare(network(), INPUTS[:4], hs.Recipe.uniform(3, 3))
    hs.observe(q, list(data(2)[0].split(32)))
    hs.calibrate(q)
    return q


def test_steps_taken_alone_know_the_float_model():
    q = calibrated()
    found = hs.partial(q, hs.Agreement(BATCHES), max_drop=0.1)
    assert found.float_score == 1 and (found.met == (found.score >= 0.9 - 1e-12))
    table = hs.sensitivity(calibrated(), "metric", metric=hs.SQNR(BATCHES))
    assert all(0 < row.score < 144.5 for row in table.rows)
    q = calibrated()
    hs.calibrate(q, hs.best_of(hs.Max(), hs.Percentile(99.9), metric=hs.Cosine(BATCHES)))
    repaired = hs.repair(q, metric=hs.SQNR(BATCHES))
    assert repaired.score_after >= repaired.score_before


def test_training_is_judged_by_the_float_model_as_it_was_before():
    q = calibrated()
    metric = hs.SQNR(BATCHES).against(network())
    before = metric.evaluate(q).value
    training = hs.Training([data(5)], torch.nn.functional.cross_entropy, epochs=3, evaluate_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = hs.train(q, training, hs.SQNR(BATCHES))
    best = max(mark.score for mark in trained.marks)
    assert best == pytest.approx(metric.evaluate(q).value) and best >= before - 1e-9


def test_a_model_in_half_precision_answers_as_it_was_handed_over():
    half = network().to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = climb(metric=hs.SQNR(BATCHES), model=half, floor=10, recipe=hs.Recipe.int8())
    with torch.no_grad():
        wanted = half(INPUTS.bfloat16()).double()
        got = outcome.model(INPUTS).double()
    ratio = wanted.square().sum() / (wanted - got).square().sum()
    assert outcome.score == pytest.approx(float(10 * ratio.log10()), abs=1e-3)
