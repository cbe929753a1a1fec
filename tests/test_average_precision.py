"""The bench's own evaluator of detectors: facts that a pencil can check."""

import pytest
import torch

from bench.average_precision import average_precision, match, mean_average_precision, overlaps, suppress

BOX = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
ONE = torch.tensor([1])


def boxes(*sides):
    return torch.tensor(sides, dtype=torch.float32)


def test_overlap_of_boxes_that_share_nothing_or_are_empty_is_zero():
    assert overlaps(BOX, boxes([10, 10, 20, 20], [3, 3, 3, 3])).tolist() == [[0.0, 0.0]]
    assert overlaps(BOX, BOX).item() == pytest.approx(1)


def test_the_better_of_two_boxes_of_a_class_stays_and_another_class_is_left_alone():
    three = BOX.repeat(3, 1)
    kept = suppress(three, torch.tensor([0.5, 0.9, 0.7]), torch.tensor([1, 1, 2]))
    assert kept.tolist() == [1, 2]


def test_a_box_that_covers_most_counts_at_some_thresholds():
    # Intersection over union 80 / 100: right at 0.50, 0.55, ..., 0.80.
    found = match(boxes([0, 0, 10, 8]), torch.tensor([0.9]), ONE, BOX, ONE, 3)
    assert found.hits.sum() == 7 and found.wanted.tolist() == [0, 1, 0]
    assert mean_average_precision([found]) == pytest.approx(0.7)


def test_a_true_box_is_found_once():
    found = match(BOX.repeat(2, 1), torch.tensor([0.4, 0.9]), ONE.repeat(2), BOX, ONE, 3)
    assert found.scores.tolist() == pytest.approx([0.9, 0.4])
    assert found.hits[:, 0].tolist() == [True, False]


def test_boxes_of_another_class_are_no_hits():
    found = match(BOX, torch.tensor([0.9]), torch.tensor([2]), BOX, ONE, 3)
    assert mean_average_precision([found]) == 0


def test_precision_at_a_recall_is_the_best_at_it_or_higher():
    # Hit, miss, hit of two true boxes: precision 1 up to recall 0.5, 2/3 from there; 51 recalls of 101 are up to 0.5.
    hits = torch.tensor([[True], [False], [True]])
    assert average_precision(hits, 2).item() == pytest.approx((51 + 50 * 2 / 3) / 101)
    # What is never found has precision 0.
    assert average_precision(hits[:1], 2).item() == pytest.approx(51 / 101)
    assert average_precision(torch.zeros(0, 1, dtype=torch.bool), 2).item() == 0


def test_classes_that_are_nowhere_do_not_count():
    right = match(BOX, torch.tensor([0.9]), ONE, BOX, ONE, 3)
    missed = match(BOX[:0], torch.zeros(0), ONE[:0], BOX, torch.tensor([2]), 3)
    assert mean_average_precision([right]) == pytest.approx(1)
    assert mean_average_precision([right, missed]) == pytest.approx(0.5)
