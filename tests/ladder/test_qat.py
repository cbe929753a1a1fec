"""The rung of quantization-aware training in a climb."""

import copy
import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

import halfstep as hs
from halfstep.journal import Journal
from halfstep.ladder.float_score import float_evaluation
from halfstep.ladder.goal import Goal
from halfstep.ladder.qat import climb_qat
from halfstep.ladder.search import Search
from tests.training.networks import calibrated, task, trained_net

HELD_OUT = hs.Accuracy(task(512, 256, seed=1))


@pytest.fixture(scope="module")
def prepared():
    return calibrated(trained_net(), 2, 3)


def training(**changes):
    return hs.Training(
        **{"labelled": task(), "loss": cross_entropy, "learning_rate": 1e-2, "epochs": 2} | changes
    )


def searched(prepared, max_drop, folder=None):
    q = copy.deepcopy(prepared)
    journal = Journal(folder)
    baseline, made = float_evaluation(HELD_OUT, q, journal)
    return Search(q, HELD_OUT, Goal(max_drop, baseline), [] if folder else made, journal=journal)


def test_it_stops_at_the_goal_and_leaves_the_best(prepared):
    search = searched(prepared, max_drop=0.02)
    start = search.evaluate("PTQ")
    assert not search.goal.met(start)
    score = climb_qat(search, training(epochs=4, evaluate_every=0.25))
    assert search.goal.met(score)
    assert HELD_OUT.evaluate(search.model).value == score.value == search.best.score.value
    assert search.decisions[-1].startswith(f"QAT scores {score.value:.4f}")
    assert "steps from a learning rate of 0.01; step" in search.decisions[-1]
    assert "of 32 steps" in search.decisions[-1] and "32 of 32" not in search.decisions[-1]
    search.best.snapshot.restore()
    assert HELD_OUT.evaluate(search.model).value == score.value


def test_float_layers_of_the_best_candidate_stay_float(prepared):
    search = searched(prepared, max_drop=0.0)
    search.model.float_layers = ["fc"]
    search.evaluate("partial")
    search.model.float_layers = []
    climb_qat(search, training(epochs=0.5))
    assert search.model.float_layers == {"fc"}


def test_the_control_is_scored_once_and_told(prepared):
    search = searched(prepared, max_drop=0.0)
    climb_qat(search, training(epochs=0.5, control=True))
    assert any("fine-tuned in the same way" in sentence for sentence in search.decisions)
    assert [made.what for made in search.evaluations].count("the float control") == 1


def test_a_training_that_diverges_leaves_the_start(prepared):
    search = searched(prepared, max_drop=0.0)
    before = search.evaluate("PTQ")
    batches = [(images * float("nan"), labels) for images, labels in task()]
    score = climb_qat(search, training(labelled=batches))
    assert score.value == before.value
    assert search.decisions[-1].startswith(
        "QAT diverged: training batch 0: step 1 of 16: the loss became nan"
    )


def test_a_killed_rung_goes_on_with_what_it_had_evaluated(prepared, tmp_path):
    def climb(folder, killed_at=None):
        calls = itertools.count()

        def loss(outputs, labels):
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            return cross_entropy(outputs, labels)

        search = searched(prepared, 0.0, folder)
        with search.journal:
            search.evaluate("PTQ")
            return search, climb_qat(search, training(loss=loss, checkpoint_every=3))

    whole, score = climb(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        climb(tmp_path / "broken", killed_at=10)
    broken, again = climb(tmp_path / "broken")
    assert again.value == score.value
    assert [made.what for made in broken.evaluations] == [made.what for made in whole.evaluations]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(broken.model.state_dict()[name], tensor)
