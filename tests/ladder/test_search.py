"""The memory of evaluations, early verdicts, and the check that the metric repeats itself."""

import warnings

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import DataError
from halfstep.evaluate import EarlyStopping
from halfstep.ladder.float_score import float_evaluation
from halfstep.ladder.goal import Goal
from halfstep.ladder.search import Search
from halfstep.snapshot import fingerprint

INPUTS = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    q = hs.prepare(network, INPUTS[:2])
    hs.observe(q, [INPUTS[:200]])
    hs.calibrate(q)
    return q


def labelled(model):
    with model.using(hs.model.Mode.FLOAT), torch.no_grad():
        labels = model(INPUTS).argmax(1)
    return list(zip(INPUTS.split(100), labels.split(100), strict=True))


class Counting(hs.Accuracy):
    """Counts the examples that it is asked to score."""

    asked = 0

    def stream(self, *args, **kwargs):
        for scores in super().stream(*args, **kwargs):
            self.asked += len(scores)
            yield scores


def begin(model, max_drop=0.05, metric=None, **options):
    metric = metric or Counting(labelled(model))
    score, made = float_evaluation(metric, model)
    return Search(model, metric, Goal(max_drop, score), made, **options)


def test_the_fingerprint_names_what_is_computed(model):
    before = fingerprint(model)
    assert fingerprint(model) == before == fingerprint(__import__("copy").deepcopy(model))
    model.float_layers = ["2"]
    one = fingerprint(model)
    model.float_layers = []
    assert one != before and fingerprint(model) == before
    hs.calibrate(model, hs.Percentile(99.0))
    other = fingerprint(model)
    hs.calibrate(model)
    assert other != before and fingerprint(model) == before
    with model.using(hs.model.Mode.QUANTIZE, activations=False):
        assert fingerprint(model) != before
    model.shifts["0"].shift.fill_(1)
    assert fingerprint(model) != before
    model.shifts["0"].shift.zero_()
    with torch.no_grad():
        model.weight("0.bias").add_(1)
    assert fingerprint(model) != before


def test_nothing_is_scored_twice(model):
    search = begin(model)
    base = search.scorer.asked
    first = search.evaluate("all quantized")
    assert search.evaluate("the same") is first and search.judge("the same again").score is first
    model.float_layers = ["0"]
    search.evaluate("one in float")
    model.float_layers = []
    search.evaluate("back again")
    assert search.scorer.asked - base == 2 * len(INPUTS)
    assert [e.what for e in search.evaluations[2:]] == ["all quantized", "one in float"]


def test_an_early_verdict_is_completed_when_the_whole_score_is_asked_for(model):
    search = begin(model)
    base = search.scorer.asked
    verdict = search.judge("all quantized")
    seen = search.scorer.asked - base
    assert verdict.met and not verdict.complete and seen < len(INPUTS) / 2
    assert search.memory.saved == len(INPUTS) - seen
    score = search.evaluate("all quantized, to the end")
    assert search.scorer.asked - base == len(INPUTS) and search.memory.saved == 0
    assert torch.equal(score.per_example, hs.Accuracy(search.scorer.labelled).evaluate(model).per_example)
    assert search.memory.replayed_cost == pytest.approx(1 + 1000 / 2000 + 1)


def test_a_strict_goal_is_met_on_all_examples_only(model):
    metric = Counting(labelled(model))
    score, made = float_evaluation(metric, model)
    search = Search(model, metric, Goal(0.05, score, strict=True), made)
    verdict = search.judge("all quantized")
    assert search.memory.verdicts[fingerprint(model)] == [verdict] and verdict.complete
    with torch.no_grad():
        model.weight("2.bias").add_(torch.tensor([9.0, 0, 0]))
    verdict = search.judge("broken")
    assert not verdict.met and not verdict.complete


def test_without_early_stopping_every_verdict_is_complete(model):
    search = begin(model, early=False)
    assert search.judge("all quantized").complete
    assert begin(model).never_early == ""
    plain = begin(model, metric=hs.CallableMetric(lambda m: 1.0))
    assert plain.judge("all quantized").complete and "no scores of single examples" in plain.never_early


def test_where_an_example_s_score_depends_on_its_batch_no_verdict_is_early():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    q = hs.prepare(network, INPUTS[:2], hs.Recipe.dynamic())
    hs.observe(q, [INPUTS[:200]])
    hs.calibrate(q)
    loud = torch.where(torch.arange(len(INPUTS)) < 100, 30.0, 1.0)[:, None]  # one batch of other inputs
    with torch.no_grad():
        labels = network(INPUTS * loud).argmax(1)
    metric = hs.Accuracy(list(zip((INPUTS * loud).split(100), labels.split(100), strict=True)))
    shuffled = EarlyStopping(metric, metric.evaluate(network))
    q.set_mode(hs.model.Mode.QUANTIZE)
    whole = metric.evaluate(q)
    assert not torch.equal(shuffled.finish(q, torch.zeros(0)).per_example, whole.per_example)  # why
    search = begin(q, metric=metric)
    verdict = search.judge("ranges at run time")
    assert verdict.complete and torch.equal(verdict.score.per_example, whole.per_example)
    assert search.never_early == "ranges per tensor at run time make an example's score depend on its batch"
    q.float_layers = q.layer_names
    assert search.never_early == "" and not search.judge("none quantized").complete


def test_a_metric_that_gets_better_by_quantizing_is_asked_about(model):
    metric = hs.CallableMetric(lambda m: float(m(INPUTS[:100]).abs().mean()))
    with model.using(hs.model.Mode.FLOAT):
        score = metric.evaluate(model)
    with torch.no_grad():
        model.weight("2.bias").add_(5)
    search = Search(model, metric, Goal(0.01, score))
    search.evaluate("broken")
    assert "say higher_is_better=False" in search.decisions[0]


def test_a_metric_that_repeats_itself_costs_a_part_of_an_evaluation(model):
    metric = Counting(labelled(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score, made = float_evaluation(metric, model)
    assert score.value == 1 and metric.asked == 3000
    assert [(e.examples, e.total) for e in made] == [(2000, 2000), (1000, 2000)]


def test_noise_is_warned_of(model):
    values = iter([0.9, 0.8])
    noisy = hs.CallableMetric(lambda m: next(values))
    with pytest.warns(
        UserWarning, match=r"scores 0.9, and 0.8 when scored again: drops smaller than .* \(0.1\)"
    ):
        float_evaluation(noisy, model)


def test_another_order_each_time_is_warned_of_and_never_paired(model):
    batches = labelled(model)
    batches = [
        (x, torch.where(torch.arange(100) < i * 5, y, (y + 1) % 3)) for i, (x, y) in enumerate(batches)
    ]

    class Loader:
        def __iter__(self):
            batches.append(batches.pop(0))
            return iter(batches)

    with pytest.warns(UserWarning, match=r"give the examples in the same order each time"):
        score, _ = float_evaluation(hs.Accuracy(Loader()), model)
    assert score.per_example is None


def test_early_verdicts_are_remembered_with_the_goal_that_they_were_given_against(model):
    """Held to less and then, as a run goes on, to the first goal again: nothing is scored twice for either."""
    search = begin(model, max_drop=0.3)
    wide, tight = search.goal, Goal(0.03, search.goal.float_score)
    before = search.scorer.asked
    assert search.judge("met by far").met and search.evaluations[-1].share < 1
    asked = search.scorer.asked
    search.hold_to(tight)
    assert search.judge("met more narrowly").met
    more = search.scorer.asked - asked
    assert 0 < more < len(INPUTS)
    for goal in (wide, tight, Goal(0.4, search.goal.float_score)):
        search.hold_to(goal)
        assert search.judge("known").met
    assert search.scorer.asked == asked + more
    search.evaluate("whole")  # only what no verdict has seen
    assert search.scorer.asked == before + len(INPUTS)


@pytest.mark.filterwarnings("ignore:The model is handed over")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_float_model_that_answers_nan_is_no_baseline(dtype):
    """Its NaN would count as mistakes, which the quantized network, whose codes know no NaN, does not make."""
    inputs, labels = torch.randn(64, 4), torch.zeros(64, dtype=torch.int64)
    late = inputs.clone()
    late[3, 1] = torch.nan
    model = hs.prepare(nn.Linear(4, 3).to(dtype), inputs.to(dtype))
    data = [(inputs.to(dtype), labels), (late.to(dtype), labels)]
    with pytest.raises(DataError, match=r"metric: batch 1: the float model answers NaN, in 3 of 192"):
        float_evaluation(hs.Accuracy(data), model)
    assert not any(module._forward_hooks for module in (model, model.handed_over))
