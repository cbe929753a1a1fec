"""Every calibrator tried on one pass: ranked by the outputs, judged by the metric."""

import dataclasses

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.calibration.candidates import BestOf
from halfstep.errors import ArgumentError
from halfstep.evaluate import Score
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Reference
from halfstep.ladder import ptq
from halfstep.ladder.goal import Goal
from halfstep.ladder.ptq import climb_ptq
from halfstep.ladder.search import Search
from halfstep.ranges import activation_sites


class Net(nn.Module):
    """Three convs and a head; the first conv's output has outliers, so that calibrators disagree."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).amax((2, 3)))


def images(count, seed):
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x * (1 + 20 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) > 0.999))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return Net().eval()


def observed(model, weights=4, activations=4):
    q = hs.prepare(model, images(2, 0), recipe=hs.Recipe.uniform(weights, activations))
    hs.observe(q, images(48, 1).split(16))
    return q


@pytest.fixture(scope="module")
def swept(model):
    q = observed(model)
    return q, hs.calibrate(q, hs.best_of())


def test_ranked_by_the_measure_and_the_model_is_left_with_the_best(swept):
    q, found = swept
    losses = [candidate.fidelity.kl for candidate in found.candidates]
    assert losses == sorted(losses)
    assert q.mode is Mode.QUANTIZE
    assert Reference(q).compare(q) == found.best.fidelity
    assert found.best is found.best_by_measure
    assert found.examples == 48
    assert found.evaluations == 0


def test_every_candidate_is_what_its_calibrator_gives_alone(model, swept):
    _, found = swept
    by_name = {name: c for c in found.candidates for name in c.activations.split(" = ")}
    assert {str(calibrator) for calibrator in hs.best_of().calibrators} <= set(by_name)
    q = observed(model)
    hs.calibrate(q, hs.Entropy(), weights=hs.MSE())
    assert by_name["entropy"].weights == "mse"
    assert Reference(q).compare(q) == by_name["entropy"].fidelity


def test_low_bit_weights_are_searched(swept):
    _, found = swept
    assert found.weights_alone["mse"].kl < found.weights_alone["max"].kl
    assert found.best.weights == "mse"


def test_calibrators_that_answer_alike_are_tried_once(model):
    q = observed(model)
    found = hs.calibrate(q, hs.best_of(hs.Max(), hs.Percentile(100), weights=[hs.Max()]))
    assert [candidate.activations for candidate in found.candidates] == ["max = percentile(100)"]
    assert found.passes == 4  # float, weights alone, the candidate, activations alone


def test_mixed_is_never_further_away_than_the_best_uniform_one(model):
    calibrators = (hs.Max(), hs.Percentile(99.9), hs.MSE())
    for activations in (8, 4, 3):
        q = observed(model, 8, activations)
        found = hs.calibrate(q, hs.best_of(*calibrators))
        mixed = [candidate for candidate in found.candidates if candidate.activations == "mixed"]
        if mixed:
            assert found.best is mixed[0]
            assert len({mixed[0].answers[site].calibrator for site in activation_sites(q)}) > 1
        uniform = hs.calibrate(q, hs.best_of(*calibrators, mixed=False))
        assert found.best.fidelity.kl <= uniform.best.fidelity.kl


def test_a_site_gets_the_calibrator_that_suits_it():
    """Two branches: one is read through a comparison with its largest value, one through its mean."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.peaks, self.bulk = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            for layer in (self.peaks, self.bulk):
                layer.weight.data = torch.eye(64)

        def forward(self, x, y):
            return torch.cat([self.peaks(x).clamp(min=9.0), self.bulk(y).clamp(max=1.0)], 1)

    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 256, 64, generator=generator)
    x[:, 0], y[:, 0] = 10.0, 40.0
    q = hs.prepare(Branches(), (x[:2], y[:2]), recipe=hs.Recipe.uniform(8, 4))
    hs.observe(q, [(x, y)])
    found = hs.calibrate(q, hs.best_of(hs.Max(), hs.Percentile(98), by="sqnr"))
    assert found.best.activations == "mixed"
    assert {site: str(found.best.answers[site].calibrator) for site in ("x", "y")} == {
        "x": "max",
        "y": "percentile(98)",
    }
    assert str(q.sites["y"].calibrated_by) == "percentile(98)"


def test_passes_are_counted_as_made(model):
    q = observed(model)
    batches = 0

    def count(*_):
        nonlocal batches
        batches += 1

    handle = q.register_forward_hook(count)
    found = hs.calibrate(q, hs.best_of(hs.Max(), hs.MSE(), mixed=False))
    handle.remove()
    assert batches == 3 * found.passes


def test_the_metric_decides_among_the_best_few(model):
    q = observed(model)
    scores = iter([0.5, 0.9, 0.7])
    found = hs.calibrate(q, hs.best_of(metric=lambda _: next(scores), finalists=3))
    assert [candidate.score for candidate in found.candidates[:3]] == [0.9, 0.7, 0.5]
    assert all(candidate.score is None for candidate in found.candidates[3:])
    assert found.evaluations == 3
    assert found.best is not found.best_by_measure
    assert Reference(q).compare(q) == found.best.fidelity


def test_weights_only(model):
    q = hs.prepare(model, images(2, 0), recipe=hs.Recipe.uniform(4, None))
    hs.observe(q, [images(32, 1)])
    found = hs.calibrate(q, hs.best_of())
    assert {str(candidate) for candidate in found.candidates} == {"weights by max", "weights by mse"}
    assert found.best.weights == "mse"
    assert found.activations_alone is None


def test_activations_only(model):
    q = observed(model, None, 4)
    found = hs.calibrate(q, hs.best_of(hs.Max(), hs.MSE()))
    assert {candidate.weights for candidate in found.candidates} == {"float"}
    assert not found.weights_alone
    assert found.activations_alone is None


def test_the_table(swept):
    _, found = swept
    lines = str(found).splitlines()
    assert lines[0].split() == ["activations", "weights", "KL", "SQNR,", "dB", "metric"]
    assert len(lines) == 1 + len(found.candidates) + 3 + 1
    assert (
        lines[-1]
        == f"ranked by kl: 48 examples, {found.passes} passes over them, 0 evaluations of the metric"
    )


def test_options_that_cannot_be(model):
    with pytest.raises(ArgumentError, match=r"best_of, calibrators: got 99.9, needed a Calibrator"):
        hs.best_of(99.9)
    with pytest.raises(
        ArgumentError, match=r"best_of, weights: got Entropy\(.*\), needed a WeightCalibrator"
    ):
        hs.best_of(weights=[hs.Entropy()])
    with pytest.raises(ArgumentError, match=r"best_of, weights: got none, needed at least one"):
        hs.best_of(weights=[])
    with pytest.raises(ArgumentError, match=r"best_of, finalists: got 0"):
        hs.best_of(finalists=0)
    q = hs.prepare(nn.Linear(4, 1), torch.randn(2, 4))
    hs.observe(q, [torch.randn(8, 4)])
    with pytest.raises(ArgumentError, match=r"choose by='sqnr'"):
        hs.calibrate(q, hs.best_of())
    assert hs.calibrate(q, hs.best_of(by="sqnr")).by == "sqnr"


@dataclasses.dataclass
class Fixed:
    """A scorer that answers from a list."""

    answers: list
    higher_is_better: bool = True

    def evaluate(self, model):
        return Score(self.answers.pop(0))


def climb(model, answers, max_drop=0.1):
    scorer = Fixed(list(answers))
    search = Search(observed(model), scorer, Goal(max_drop, Score(1.0)))
    return search, climb_ptq(
        search, BestOf((hs.Max(), hs.Percentile(99.9), hs.MSE(), hs.Entropy()), mixed=False)
    )


def test_the_rung_stops_at_the_first_candidate_that_meets_the_goal(model):
    search, score = climb(model, [0.95])
    assert score.value == 0.95
    assert len(search.evaluations) == 1
    assert "weights alone leave" in search.decisions[1]
    assert "+0.0500 below float (allowed 0.1); 1 of" in search.decisions[-1]


def test_the_rung_evaluates_a_few_and_leaves_the_best(model, monkeypatch):
    monkeypatch.setattr(ptq, "REPAIR_SECONDS", 0.0)  # no repairs
    search, score = climb(model, [0.3, 0.6, 0.5])
    assert score.value == 0.6
    assert len(search.evaluations) == 3
    assert search.evaluations[1].what.removeprefix("PTQ, ") in search.decisions[-1]


def test_calibrators_are_mixed_only_where_the_nearest_one_misses(model, monkeypatch):
    monkeypatch.setattr(ptq, "REPAIR_SECONDS", 0.0)
    mixed, mix = [], ptq.mix
    monkeypatch.setattr(ptq, "mix", lambda *a: mixed.append(mix(*a)) or mixed[-1])
    options = BestOf((hs.Max(), hs.Percentile(99.9), hs.MSE()))
    search = Search(observed(model, 8, 3), Fixed([0.95]), Goal(0.1, Score(1.0)))
    assert climb_ptq(search, options).value == 0.95
    assert not mixed and len(search.evaluations) == 1

    search = Search(observed(model, 8, 3), Fixed([0.3, 0.6, 0.5]), Goal(0.1, Score(1.0)))
    assert climb_ptq(search, options).value == 0.6
    (found,), whole = mixed, hs.calibrate(observed(model, 8, 3), options)
    assert len(search.evaluations) == 3 and f"3 of {len(found.candidates)} candidates" in search.decisions[-1]
    assert [str(candidate) for candidate in found.candidates] == [str(each) for each in whole.candidates]
    assert [each.fidelity for each in found.candidates] == [each.fidelity for each in whole.candidates]


def test_what_is_clearly_worse_is_seen_on_few_examples(model, monkeypatch):
    monkeypatch.setattr(ptq, "REPAIR_SECONDS", 0.0)
    inputs = images(2000, 3)
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    metric = hs.Accuracy(list(zip(inputs.split(500), labels.split(500), strict=True)))
    search = Search(observed(model, 8, 8), metric, Goal(-1.0, metric.evaluate(model), bounds=(0.0, 1.0)))
    options = BestOf((hs.Max(), hs.Percentile(50)), mixed=False, weights=(hs.Max(),))
    score = climb_ptq(search, options)
    first, second = search.evaluations
    assert first.what == "PTQ, max, weights by max" and first.share == 1 and first.score == score.value
    assert second.what == "PTQ, percentile(50), weights by max" and second.share < 1
    assert "1 of 2 candidates were evaluated" in search.decisions[-1]
    assert search.goal.max_drop == -1.0 and search.best.score.value == score.value


def test_what_may_be_better_is_evaluated_whole(model, monkeypatch):
    monkeypatch.setattr(ptq, "REPAIR_SECONDS", 0.0)
    inputs = images(300, 3)
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    metric = hs.Accuracy([(inputs, labels)])
    search = Search(observed(model, 8, 8), metric, Goal(-1.0, metric.evaluate(model), bounds=(0.0, 1.0)))
    found = hs.calibrate(
        search.model, hs.best_of(hs.Max(), hs.Percentile(50), weights=(hs.Max(),), mixed=False)
    )
    turned = dataclasses.replace(found, candidates=found.candidates[::-1])
    judged, score = ptq._judged(search, turned, 2)
    assert str(judged.best) == "max, weights by max" and judged.evaluations == 2
    assert score.count == 300 and score.value > judged.candidates[1].score
