"""A run that was killed goes on where it was, ends as the unbroken one does, and repeats no finished evaluation."""

import json
import multiprocessing
import re
import time
from types import SimpleNamespace

import pytest
import torch
from climbing import BATCHES, climb, climb_in_a_process, data, kill_somewhere

import halfstep as hs
from halfstep.errors import RunError
from halfstep.ladder.journal import FILE, Journal

MEASURED = ("latency_ms", "microseconds", "history")


def figures(folder):
    """What must not depend on kills: everything but measured times."""
    record = json.loads((folder / "outcome.json").read_text())
    history = [(made["what"], made["rung"], made["score"]) for made in record["history"]]
    record["decisions"] = [re.sub(r"[\d.]+ (s|min)\b", "", sentence) for sentence in record["decisions"]]
    return {**{name: record[name] for name in record if name not in MEASURED}, "history": history}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    start = time.perf_counter()
    outcome = climb(folder / "run", folder / "marks")
    seconds = time.perf_counter() - start
    return SimpleNamespace(
        folder=folder / "run",
        calls=len((folder / "marks").read_text()),
        lines=len((folder / "run" / FILE).read_bytes().splitlines()),
        outcome=outcome,
        seconds=seconds,
    )


def test_every_evaluation_is_in_the_journal_once(unbroken):
    assert unbroken.outcome.float_score == 1
    assert [step.rung for step in unbroken.outcome.path] == ["ptq", "partial", "qat"]
    assert unbroken.outcome.evaluations == len(unbroken.outcome.history)
    assert unbroken.calls == sum(made.share * BATCHES for made in unbroken.outcome.history)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("share", [0.6, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.3, 0.8, 1.0))])
def test_killed_within_a_line_of_the_journal(unbroken, tmp_path, monkeypatch, share):
    survived = int(share * (unbroken.lines - 1))
    write = Journal.write

    def deadly(self, kind, **entry):
        write(self, kind, **entry)
        if len(self.entries) > survived:
            path = self.folder / FILE
            path.write_bytes(path.read_bytes()[:-5])
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", deadly)
        with pytest.raises(Killed):
            climb(tmp_path / "run", tmp_path / "marks")
    climb(tmp_path / "run", tmp_path / "marks")
    assert figures(tmp_path / "run") == figures(unbroken.folder)
    assert len((tmp_path / "marks").read_text()) <= unbroken.calls + BATCHES


def test_the_same_call_again_evaluates_nothing(unbroken, tmp_path):
    outcome = climb(unbroken.folder, tmp_path / "marks")
    assert not (tmp_path / "marks").exists()
    assert outcome.score == unbroken.outcome.score
    assert outcome.deployed_score == unbroken.outcome.deployed_score
    assert outcome.evaluations == unbroken.outcome.evaluations
    assert len((unbroken.folder / FILE).read_bytes().splitlines()) == unbroken.lines


def kill_again_and_again(unbroken, folder, kills):
    """Kill ``kills`` times, then let it end; how many batches the metric scored in all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["halfstep", "onnxruntime", "onnx", "numba", "climbing"])
    marks = folder / "marks"
    for kill in range(kills):
        process = context.Process(target=climb_in_a_process, args=(folder / "run", marks))
        process.start()
        kill_somewhere(process, unbroken.seconds, kill)
    climb(folder / "run", marks)
    assert figures(folder / "run") == figures(unbroken.folder)
    return len(marks.read_text())


def test_sigkill_at_a_random_moment(unbroken, tmp_path):
    assert kill_again_and_again(unbroken, tmp_path, 1) <= unbroken.calls + BATCHES


@pytest.mark.slow
def test_sigkill_at_twenty_random_moments(unbroken, tmp_path):
    assert kill_again_and_again(unbroken, tmp_path, 20) <= unbroken.calls + 20 * BATCHES


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"recipe": hs.Recipe.uniform(4, 4)}, "recipe"),
        ({"max_drop": 0.02}, "configuration"),
        ({"calibration": [data(3)[0]]}, "calibration data"),
    ],
)
def test_a_directory_of_another_run_is_refused(unbroken, tmp_path, options, what):
    before = (unbroken.folder / FILE).read_bytes()
    with pytest.raises(RunError, match=f"belongs to a run with another {what}; choose another directory"):
        climb(unbroken.folder, tmp_path / "marks", **options)
    assert (unbroken.folder / FILE).read_bytes() == before


def test_another_metric_is_refused(unbroken):
    with pytest.raises(RunError, match="belongs to a run with another metric;"):
        climb(unbroken.folder)


def test_another_model_is_refused(unbroken, tmp_path):
    inputs, labels = data()
    with pytest.raises(RunError, match="belongs to a run with another model;"):
        hs.quantize(
            torch.nn.Linear(6, 4),
            inputs[:4],
            calibration=[inputs],
            metric=hs.Accuracy([(inputs, labels)]),
            directory=unbroken.folder,
        )


def test_other_labels_are_refused(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr("climbing.data", lambda *_: (data()[0], data()[1].flip(0)))
    with pytest.raises(RunError, match="belongs to a run with another labelled data;"):
        climb(unbroken.folder, tmp_path / "marks")
