"""Where few examples show that a simulation meets the target, its file is scored on all of them instead."""

import numpy as np
import onnx
import onnxruntime
import pytest
from climbing import CountedAccuracy, climb, data
from test_file_misses import leave_one_in_float, refuse, spoil

import halfstep as hs
from halfstep.report.page import page
from halfstep.report.run import Run

COUNT, BATCH = 4096, 64
INPUTS, LABELS = data(7, COUNT)
LABELLED = list(zip(INPUTS.split(BATCH), LABELS.split(BATCH), strict=True))


def easy(folder, **options):
    """A climb whose first candidate is well within what is allowed."""
    settings = {
        "metric": hs.Accuracy(LABELLED),
        "recipe": hs.Recipe.uniform(8, 8),
        "max_drop": 0.05,
        "training": None,
        **options,
    }
    return climb(folder, **settings)


def simulations(outcome):
    """Examples that candidates were simulated on, one evaluation each."""
    return [made.examples for made in outcome.history if made.rung not in ("float", "deployed")]


def test_the_file_is_scored_on_all_and_the_simulation_on_few(tmp_path):
    outcome = easy(tmp_path)
    assert outcome.met and outcome.rung == "ptq"
    [seen] = simulations(outcome)
    assert seen == outcome.simulated < COUNT / 4
    [deployed] = [made for made in outcome.history if made.rung == "deployed"]
    assert deployed.examples == COUNT
    assert outcome.score == outcome.deployed_score == deployed.score == outcome.path[0].score
    # What the file scores is what its runtime answers, counted without the search.
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    name = session.get_inputs()[0].name
    answers = np.concatenate([session.run(None, {name: x.numpy()})[0] for x in INPUTS.split(BATCH)])
    assert outcome.deployed_score == pytest.approx((answers.argmax(1) == LABELS.numpy()).mean())


def test_it_is_said_how_few(tmp_path):
    outcome = easy(tmp_path)
    assert f"simulated on {outcome.simulated:,} examples" in repr(outcome)
    words = f"{outcome.simulated:,} examples sufficed"
    assert any(fact.name == "simulated score" and fact.words.startswith(words) for fact in outcome.facts())
    assert words in page(Run.read(tmp_path))
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert "halfstep.float_score" in about and "halfstep.score" not in about
    again = onnx.load(outcome.export(tmp_path / "again.onnx"))
    assert {entry.key: entry.value for entry in again.metadata_props} == about


def test_the_same_call_again_scores_nothing(tmp_path):
    marks = tmp_path / "marks"
    metric = CountedAccuracy(LABELLED, marks)
    first = easy(tmp_path / "run", metric=metric)
    done = marks.read_text()
    again = easy(tmp_path / "run", metric=metric)
    assert marks.read_text() == done
    assert (again.path, again.score, again.simulated) == (first.path, first.score, first.simulated)


@pytest.mark.parametrize("spoiled", ["misses", "refused"])
def test_where_the_file_is_no_good_the_simulation_runs_on_all(monkeypatch, spoiled):
    if spoiled == "misses":
        spoil(monkeypatch, ("ptq",))  # a quarter of each batch
    else:
        refuse(monkeypatch, ("ptq",))
    outcome = easy(None, rungs=("ptq", "partial"), max_float=1.0)
    ptq = outcome.path[0]
    assert (ptq.met, ptq.file_met) == (True, False)
    assert sum(simulations(outcome)[:2]) == COUNT  # a few, then the rest: none twice
    assert outcome.met == (outcome.rung == "partial")


def test_a_strict_target_is_met_by_the_simulation_on_all():
    outcome = easy(None, strict=True)
    assert outcome.met and outcome.simulated is None and simulations(outcome) == [COUNT]


def test_what_is_not_clear_is_simulated_on_all():
    outcome = easy(None, recipe=hs.Recipe.uniform(2, 2, ends=None), max_drop=0.01, rungs=("ptq",))
    assert not outcome.met and outcome.simulated is None
    best = [made for made in outcome.history if made.score == outcome.score]
    assert best and all(made.total == COUNT for made in best)


FEWER = ("ptq", hs.MixedBits(bits=(8, 4), bytes="nominal"))


def test_fewer_bits_start_from_what_its_file_accepted():
    outcome = easy(None, rungs=FEWER)
    assert outcome.met and outcome.rung == "mixed_bits"
    assert max(simulations(outcome)) < COUNT
    assert [made.rung for made in outcome.history].count("deployed") == 2  # PTQ's, and that of fewer bits


@pytest.mark.parametrize("options", [{"tune": True}, {"rungs": FEWER, "max_drop": 0.08}])
def test_a_files_score_is_never_called_the_simulations(monkeypatch, tmp_path, options):
    spoil(monkeypatch, ("ptq", "mixed_bits", "tune"), examples=1)
    monkeypatch.setattr("halfstep.ladder.costs.tune", leave_one_in_float)
    outcome = easy(tmp_path, **options)
    assert outcome.met and outcome.score == outcome.deployed_score
    assert outcome.simulated is not None and outcome.simulated < COUNT
    assert any(f"as a file; simulated on {outcome.simulated:,} examples" in s for s in outcome.decisions)
    again = easy(tmp_path, **options)
    assert (again.simulated, again.score) == (outcome.simulated, outcome.score)


def test_a_file_that_misses_is_not_scored_again(monkeypatch, tmp_path):
    spoil(monkeypatch, ("ptq",))
    outcome, again = easy(tmp_path, rungs=("ptq",)), easy(tmp_path, rungs=("ptq",))
    assert not outcome.met and outcome.simulated is None
    assert [made.rung for made in again.history].count("deployed") == 1
    assert again.deployed_score == outcome.deployed_score


def test_a_score_that_is_too_good_is_doubted_of_a_file_too():
    def wrong(outputs, labels):
        return (outputs.argmax(1) != labels).double()

    errors = hs.Metric(LABELLED, wrong, bounds=(0.0, 1.0))
    outcome = easy(None, metric=errors, recipe=hs.Recipe.uniform(3, 3), rungs=("ptq",))
    assert outcome.simulated is not None
    assert any("say higher_is_better=False" in sentence for sentence in outcome.decisions)


def test_a_file_is_not_scored_once_the_budget_is_used_up():
    outcome = easy(None, rungs=FEWER, budget=hs.Budget(evaluations=2.4))
    assert outcome.met and outcome.rung == "ptq"
    assert [made.rung for made in outcome.history].count("deployed") == 1
