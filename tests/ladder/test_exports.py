"""How often a run translates its networks: the float one once, each candidate with other weights once."""

import pytest
from climbing import climb

import halfstep as hs
from halfstep.export import trace
from halfstep.ladder import prepare as prepared

RECIPE = hs.Recipe.uniform(7, 8)  # no processor's kernels saturate


@pytest.fixture
def translated(monkeypatch):
    """Names of what is captured and translated to ONNX, in order."""
    done, translate, capture = [], trace.to_onnx, prepared.capture
    monkeypatch.setattr(trace, "to_onnx", lambda *a, **k: done.append("export") or translate(*a, **k))
    monkeypatch.setattr(prepared, "capture", lambda *a, **k: done.append("capture") or capture(*a, **k))
    return done


def test_a_rung_that_meets_the_target_is_exported_once(translated, tmp_path):
    outcome = climb(tmp_path / "run", recipe=RECIPE, max_drop=0.05)
    assert outcome.met and outcome.rung == "ptq"
    assert translated == ["capture", "export"]  # the candidate's file is of the float network's translation
    assert (tmp_path / "run" / "model.onnx").exists() and not list((tmp_path / "run").glob("candidate-*"))


def test_each_rungs_file_is_written_once_and_raced_as_it_was_scored(translated, monkeypatch):
    monkeypatch.setattr("halfstep.ladder.goal.Goal.met", lambda *_: False)  # so that every rung is climbed
    outcome = climb(None, recipe=RECIPE, max_float=1.0, rungs=("ptq", "qat"))
    assert [step.rung for step in outcome.path] == ["ptq", "qat"]
    assert translated.count("export") <= 1 + len({step.candidate for step in outcome.path})
    assert translated.count("capture") == 1


def test_a_resumed_run_exports_the_file_once_more(translated, tmp_path):
    settings = {"recipe": RECIPE, "max_drop": 0.05, "rungs": ("ptq", "partial")}
    first = climb(tmp_path / "run", **settings)
    translated.clear()
    again = climb(tmp_path / "run", **settings)
    assert translated == ["capture", "export"] and again.deployed_score == first.deployed_score
