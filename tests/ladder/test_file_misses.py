"""A file that loses more than its simulation: the climb goes on, and says so."""

import pytest
import torch
from climbing import climb, data

import halfstep as hs
from halfstep.errors import ExportError, RefusedError
from halfstep.evaluate import CallableMetric, Score, Several
from halfstep.export.onnx import export_onnx
from halfstep.ladder.goal import Goal, GoalSpec
from halfstep.report.page import page
from halfstep.report.run import Run
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.file import read_sites


def spoil(monkeypatch, rungs, examples=16):
    """Files of these rungs answer wrongly to the first examples of each batch; verification looks elsewhere."""

    class Spoilt(DeployedModel):
        def forward(self, x):
            answers = super().forward(x)
            if read_sites(self.path)[1].get("halfstep.rung") in rungs:
                answers[:examples] = -answers[:examples]
            return answers

    monkeypatch.setattr("halfstep.ladder.deploy.DeployedModel", Spoilt)


def leave_one_in_float(model, threads, among):
    """Tuning that leaves the second layer in float, whatever is faster."""
    model.float_layers = ["2"]
    return hs.Tuning(("2",), 1.0, 3)


def test_the_climb_goes_on_where_only_the_simulation_meets_the_target(monkeypatch, tmp_path):
    spoil(monkeypatch, ("ptq",))
    settings = {"recipe": hs.Recipe.uniform(6, 8), "max_drop": 0.05, "max_float": 1.0}
    outcome = climb(tmp_path / "run", **settings)
    first, second = outcome.path
    assert (first.rung, first.met, first.file_met) == ("ptq", True, False)
    assert (second.rung, second.met, second.file_met) == ("partial", True, True)
    assert outcome.met and outcome.rung == "partial" and outcome.deployed_score == second.file_score
    assert [made.rung for made in outcome.history].count("deployed") == 2  # each file is scored once
    sentence = next(s for s in outcome.decisions if "its file does not" in s)
    assert f"{first.file_score:.4f}" in sentence and sentence.startswith("Post-training quantization meets")
    assert f'data-figure="file of ptq" data-value="{first.file_score!r}"' in page(Run.read(tmp_path / "run"))
    again = climb(tmp_path / "run", **settings)
    assert again.path == outcome.path and sentence in again.decisions
    assert again.evaluations == outcome.evaluations


def test_the_last_rungs_file_is_the_outcomes(monkeypatch):
    spoil(monkeypatch, ("ptq",))
    outcome = climb(None, recipe=hs.Recipe.uniform(8, 8), max_drop=0.05, rungs=("ptq",))
    assert not outcome.met and outcome.path[0].met and outcome.path[0].file_met is None
    assert outcome.advice[0].startswith("The simulation meets the target (")


def test_a_tuned_file_that_misses_is_put_back(monkeypatch):
    monkeypatch.setattr("halfstep.ladder.costs.tune", leave_one_in_float)

    class Spoilt(DeployedModel):
        def forward(self, x):
            answers = super().forward(x)
            return -answers if read_sites(self.path)[1]["halfstep.float_layers"] == "2" else answers

    monkeypatch.setattr("halfstep.ladder.deploy.DeployedModel", Spoilt)
    outcome = climb(None, recipe=hs.Recipe.uniform(8, 8), max_drop=0.05, rungs=("ptq",), tune=True)
    assert outcome.met and outcome.float_layers == () and outcome.rung == "ptq"
    assert any("and put back: its file, " in sentence for sentence in outcome.decisions)


@pytest.mark.parametrize(
    ("simulated", "file", "expected"),
    [
        (0.895, 0.888, 0.003),  # 0.007 are lost between the two
        (0.895, 0.850, 0.0),  # more than all that is allowed: as good as float
        (0.905, 0.850, -0.005),  # better than float already: better than that
        (0.895, 0.892, 0.01),  # the file keeps to it
    ],
)
def test_what_simulations_are_held_to(simulated, file, expected):
    goal = Goal(0.01, Score(0.9))
    narrowed = goal.narrowed(Score(simulated), Score(file))
    assert narrowed.max_drop == pytest.approx(expected, abs=2e-9)
    assert narrowed.met(Score(simulated)) == goal.met(Score(file))


def test_of_several_metrics_only_the_missed_are_narrowed():
    both = Several({"a": CallableMetric(len), "b": CallableMetric(len)})
    goal = GoalSpec(0.1).goal(Score(0.9, others={"b": Score(0.9)}), both)
    narrowed = goal.narrowed(Score(0.85, others={"b": Score(0.85)}), Score(0.81, others={"b": Score(0.79)}))
    assert narrowed.max_drop == 0.1 and narrowed.others["b"].max_drop == pytest.approx(0.04)


def test_a_strict_goal_is_narrowed_by_the_intervals_ends():
    hits = torch.ones(1000)
    simulated, file = (Score.mean((torch.arange(1000) >= lost).double()) for lost in (4, 12))
    goal = Goal(0.015, Score.mean(hits), strict=True)
    assert goal.met(simulated) and not goal.met(file)
    assert not goal.narrowed(simulated, file).met(simulated)


def refuse(monkeypatch, rungs):
    """Files of these rungs part from their simulations."""
    written = export_onnx

    def strict(model, path, metadata=None, check=True):
        if check and (metadata or {}).get("rung") in rungs:
            raise RefusedError("they part at site 'x'")
        return written(model, path, metadata, check)

    monkeypatch.setattr("halfstep.ladder.pace.export_onnx", strict)


def test_a_refused_file_counts_as_missed_and_the_climb_goes_on(monkeypatch, tmp_path):
    refuse(monkeypatch, ("ptq",))
    settings = {"recipe": hs.Recipe.uniform(6, 8), "max_drop": 0.05, "max_float": 1.0}
    outcome = climb(tmp_path / "run", **settings)
    first, second = outcome.path
    assert (first.rung, first.met, first.file_met, first.file_score) == ("ptq", True, False, None)
    assert second.rung == "partial" and outcome.rung == "partial" and outcome.met
    assert any(
        "its file is refused, which counts as missed: they part at site 'x'" in s for s in outcome.decisions
    )
    assert (tmp_path / "run" / "model.onnx").exists() and not (tmp_path / "run" / "refused.onnx").exists()
    assert "they part at site" in page(Run.read(tmp_path / "run"))
    again = climb(tmp_path / "run", **settings)
    assert again.path == outcome.path and again.evaluations == outcome.evaluations


def test_where_the_last_file_is_refused_the_next_best_is_deployed(monkeypatch):
    refuse(monkeypatch, ("qat",))
    training = hs.Training([data(5)] * 20, torch.nn.functional.cross_entropy, epochs=1, learning_rate=1e-2)
    two_bits = hs.Recipe.uniform(2, 2, ends=None)
    outcome = climb(None, recipe=two_bits, max_drop=0.0, rungs=("ptq", "qat"), training=training)
    assert [step.rung for step in outcome.path] == ["ptq", "qat"]
    assert not outcome.met and outcome.rung == "ptq"
    assert outcome.score == outcome.path[0].score != outcome.path[1].score
    assert any(s.startswith("The file of QAT, ") and "is refused: they part" in s for s in outcome.decisions)


def test_where_every_file_is_refused_the_outcome_says_so(monkeypatch, tmp_path):
    stale = tmp_path / "model.onnx"
    monkeypatch.setattr(
        "halfstep.ladder.quantize._check_new", lambda _: stale.write_text("of an earlier run")
    )
    refuse(monkeypatch, ("ptq", "partial"))
    outcome = climb(tmp_path, recipe=hs.Recipe.uniform(8, 8), max_drop=0.05, rungs=("ptq",))
    assert not outcome.met and outcome.rung == "ptq"
    assert outcome.deployed_score == pytest.approx(
        outcome.score, abs=0.02
    )  # of the refused file, which is there
    assert outcome.advice[0] == "No file answers as its simulation: they part at site 'x'"
    assert outcome.to_dict()["refused"] == "they part at site 'x'"
    assert repr(outcome).startswith("Outcome: not met, its file refused, on rung ptq: float 1.0000, ")
    assert not (tmp_path / "model.onnx").exists() and (tmp_path / "refused.onnx").exists()


def test_a_tuned_file_that_is_refused_is_put_back(monkeypatch):
    monkeypatch.setattr("halfstep.ladder.costs.tune", leave_one_in_float)
    written = export_onnx

    def strict(model, path, metadata=None, check=True):
        if model.float_layers:
            raise RefusedError("they part at site 'x'")
        return written(model, path, metadata, check)

    monkeypatch.setattr("halfstep.ladder.pace.export_onnx", strict)
    outcome = climb(None, recipe=hs.Recipe.uniform(8, 8), max_drop=0.05, rungs=("ptq",), tune=True)
    assert outcome.met and outcome.float_layers == ()
    assert any("put back: its file, refused (they part at site 'x'), would" in s for s in outcome.decisions)


def test_a_place_that_cannot_be_written_to_still_ends_the_call(monkeypatch):
    def full(*_, **__):
        raise ExportError("cannot write: no space left on device")

    monkeypatch.setattr("halfstep.ladder.pace.export_onnx", full)
    with pytest.raises(ExportError, match="no space left"):
        climb(None, recipe=hs.Recipe.uniform(8, 8), max_drop=0.05, rungs=("ptq",))


def test_after_a_refused_file_simulations_are_held_to_floats_score():
    goal = Goal(0.01, Score(0.9))
    for simulated, expected in ((0.895, 0.0), (0.905, -0.005)):
        held = goal.beyond(Score(simulated))
        assert held.max_drop == pytest.approx(expected, abs=2e-9) and not held.met(Score(simulated))
    both = Goal(0.01, Score(0.9), others={"b": Goal(0.1, Score(0.7))}).beyond(
        Score(0.95, others={"b": Score(0.65)})
    )
    assert both.others["b"].max_drop == 0.0


def test_two_bits_throughout_give_an_outcome():
    outcome = climb(None, recipe=hs.Recipe.uniform(2, 2, ends=None), max_drop=0.9, rungs=("ptq",))
    assert outcome.verification.parity.sqnr > 60
    assert outcome.deployed_score == outcome.score
