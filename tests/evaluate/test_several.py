"""Several metrics: one pass where they share data, each by its name."""

import pytest
import torch

import halfstep as hs
from halfstep.errors import MetricError
from halfstep.evaluate import Several, as_scorers, early_stopping, labelled_data, parts

LOGITS = torch.eye(3).repeat(2, 1)  # (6, 3)
LABELS = torch.tensor([0, 1, 2, 0, 1, 0])
BATCHES = [(LOGITS[:4], LABELS[:4]), (LOGITS[4:], LABELS[4:])]


class Counting:
    """An identity that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x


def margin(outputs, labels):
    return outputs.gather(1, labels[:, None])[:, 0] * 3.0


def test_metrics_on_the_same_data_share_the_passes_and_others_have_their_own():
    model = Counting()
    accuracy, margins = hs.Accuracy(BATCHES), hs.Metric(BATCHES, margin)
    elsewhere = hs.Accuracy([BATCHES[0]])
    score = Several({"accuracy": accuracy, "margin": margins, "elsewhere": elsewhere}).evaluate(model)
    assert model.calls == 2 + 1
    assert score.value == pytest.approx(5 / 6) and list(score.others) == ["margin", "elsewhere"]
    for name, alone in (("margin", margins), ("elsewhere", elsewhere)):
        assert torch.equal(score.others[name].per_example, alone.evaluate(Counting()).per_example)
    assert torch.equal(score.per_example, accuracy.evaluate(Counting()).per_example)


def test_a_metric_with_a_way_of_its_own_keeps_it():
    class First(hs.Accuracy):
        def stream(self, model, labelled=None):
            yield next(super().stream(model, labelled))

    score = Several({"all": hs.Accuracy(BATCHES), "first": First(BATCHES)}).evaluate(Counting())
    assert (score.count, score.others["first"].count) == (6, 4)


def test_a_function_may_stand_beside_metrics():
    both = as_scorers({"loss": hs.CallableMetric(lambda model: 2.0, False), "accuracy": hs.Accuracy(BATCHES)})
    score = both.evaluate(Counting())
    assert (score.value, score.others["accuracy"].value) == (2.0, pytest.approx(5 / 6))
    assert not both.higher_is_better
    assert list(parts(both)) == ["loss", "accuracy"] and labelled_data(both) == [BATCHES]
    assert early_stopping(both, score) == "several metrics are judged on all examples"


def test_one_metric_has_no_name():
    metric = hs.Accuracy(BATCHES)
    assert as_scorers(metric) is metric and parts(metric) == {"": metric}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({}, r"got no metric, needed at least one by name"),
        ({"": len}, r"got the name '', needed a text, such as 'worst class'"),
        ({"a": 3}, r"^'a': metric: got int, needed hs.Accuracy"),
        ({"a": {"b": len}}, r"^'a': metric: got dict, needed hs.Accuracy"),
    ],
)
def test_metrics_that_cannot_be(metrics, message):
    with pytest.raises(MetricError, match=message):
        as_scorers(metrics)


@pytest.mark.parametrize("others", [{}, {"good": hs.Accuracy(BATCHES)}])
def test_the_metric_that_failed_is_named(others):
    bad = hs.Metric(BATCHES, lambda outputs, labels: outputs)
    with pytest.raises(MetricError, match=r"^'bad': metric: score\(outputs, labels\) gave shape \(4, 3\)"):
        Several({**others, "bad": bad}).evaluate(Counting())
