"""Accuracy: which class a row of logits predicts, ties and NaN included; labels that are none."""

import pytest
import torch

import halfstep as hs
from halfstep.errors import MetricError

NAN = float("nan")


def hits(logits, labels, top=1):
    labels = torch.as_tensor(labels)
    metric = hs.Accuracy([(torch.zeros(len(labels), 1), labels)], top=top)
    return metric.evaluate(lambda x: torch.as_tensor(logits, dtype=torch.float32)).per_example.tolist()


def test_of_equal_logits_the_first_is_predicted_as_by_argmax():
    assert hits([[2.0, 2, 2, 1]] * 4, [0, 1, 2, 3]) == [1, 0, 0, 0]
    assert hits([[2.0, 2, 2, 1]] * 4, [0, 1, 2, 3], top=2) == [1, 1, 0, 0]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (500, 20), generator=generator).float()  # many ties
    labels = torch.randint(20, (500,), generator=generator)
    assert hits(logits, labels) == (logits.argmax(1) == labels).double().tolist()
    order = logits.sort(dim=1, descending=True, stable=True).indices  # of ties the first comes first
    assert hits(logits, labels, top=5) == (order[:, :5] == labels[:, None]).any(1).double().tolist()


def test_logits_with_a_nan_predict_nothing():
    rows = [[NAN, 1.0, 0], [1, NAN, 0], [1, 0, NAN], [NAN] * 3, [1, float("-inf"), 0]]
    assert hits(rows, [0, 0, 0, 0, 0]) == [0, 0, 0, 0, 1]
    assert hits(rows, [0, 0, 0, 0, 1], top=3) == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "top", "message"),
    [
        ([0, 3], 1, r"labels go from 0 to 3, but the model has 3 classes \(0 to 2\)"),
        ([0, -1], 1, r"labels go from -1 to 0, but"),
        ([0, 1.5], 1, r"got labels of torch.float32 with fractions or NaN, needed class indices"),
        ([0, 1], 4, r"top is 4, but the model has 3 classes"),
        ([[0], [1]], 1, r"labels of shape \(2, 1\), needed \(batch, classes\) and \(batch,\)"),
    ],
)
def test_labels_that_are_no_classes(labels, top, message):
    with pytest.raises(MetricError, match=f"^Accuracy: .*{message}"):
        hits(torch.zeros(2, 3), labels, top)
    with pytest.raises(MetricError, match=r"^Accuracy: top is 0, needed at least 1"):
        hs.Accuracy([], top=0)
