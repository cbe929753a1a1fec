"""A run that was killed goes on where it was, ends as the unbroken one does, and repeats no finished evaluation."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from climbing import BATCHES, climb, climb_in_a_process, data, kill_somewhere, network

import halfstep as hs
from bench.instructions import narrower
from halfstep.errors import RunError
from halfstep.evaluate import Score, as_scorer
from halfstep.journal import CHECKPOINTS, FILE, Journal, read
from halfstep.ladder.evaluation import Decision
from halfstep.ladder.goal import Goal
from halfstep.ladder.search import Search

MEASURED = ("latency_ms", "microseconds", "history", "environment")


def timeless(decisions):
    return [re.sub(r"[\d.]+ (s|min)\b", "", sentence) for sentence in decisions]


def figures(folder):
    """What must not depend on kills: everything but measured times."""
    record = json.loads((folder / "outcome.json").read_text())
    history = [(made["what"], made["rung"], made["score"]) for made in record["history"]]
    record["decisions"] = timeless(record["decisions"])
    record["parity"]["sqnr"] = min(record["parity"]["sqnr"], 100.0)  # beyond that it is the sums' last bits
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


def test_decisions_that_tell_of_times_are_kept_once():
    journal, model = Journal(), hs.prepare(network(), data()[0])
    for seconds in (0.5, 0.7):
        search = Search(model, as_scorer(lambda _: 1.0), Goal(0.1, Score(1.0)), journal=journal)
        search.decide(f"it took {seconds} s", key="it took ")
        search.decide("8 bits")
    assert search.decisions == ("it took 0.7 s", "8 bits")
    assert [Decision.of(entry) for entry in journal.of("decision")] == [
        Decision("", "it took ", "it took 0.5 s"),
        Decision("", "8 bits", "8 bits"),
    ]


def test_a_journal_whose_keys_were_cut_from_sentences_has_no_decision_twice(unbroken, tmp_path):
    """As they were written before decisions had keys of their own."""
    with Journal(tmp_path / "run") as journal:
        for entry in read(unbroken.folder):
            data = dict(entry.data)
            measured = data.pop("measured", None)
            if entry.kind == "decision":
                data["key"] = re.sub(r"\d[\d.,e-]* (s|min)\b", "", measured["sentence"])
            if entry.kind != "step":  # rungs that were finished would be taken as they are
                journal.write(entry.kind, measured=measured, **data)
    shutil.copytree(unbroken.folder / CHECKPOINTS, tmp_path / "run" / CHECKPOINTS)
    before = [Decision.of(entry).key for entry in read(tmp_path / "run") if entry.kind == "decision"]
    climb(tmp_path / "run", tmp_path / "marks")
    after = [Decision.of(entry).key for entry in read(tmp_path / "run") if entry.kind == "decision"]
    assert after == before and any("Estimate" in key for key in before)


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


def test_what_is_to_be_said_of_the_data_is_said_by_the_run_that_goes_on(tmp_path):
    """Interrupted after the float score and before the end of calibration, the longest early part."""
    inputs, _ = data()

    def interrupted():
        yield inputs[:16]
        raise KeyboardInterrupt

    options = {"rungs": ("ptq",), "training": None, "max_drop": 1.0}
    with pytest.raises(KeyboardInterrupt):
        climb(tmp_path, calibration=interrupted(), **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        outcome = climb(tmp_path, calibration=[inputs[:16] * 5], **options)
    said = [str(warning.message) for warning in told]
    assert any("16 calibration examples are few" in sentence for sentence in said)
    assert any("calibrate on data like those the model will see" in sentence for sentence in said)
    assert set(said) <= set(outcome.decisions)
    again = climb(tmp_path, calibration=[inputs[:16] * 5], **options)  # no warning: they were heard
    assert timeless(again.decisions) == timeless(outcome.decisions)


class CountingLoss:
    """Cross entropy; how often it was asked makes it no other loss."""

    def __init__(self):
        self.calls = 0

    def __getstate__(self):
        return {}

    def __call__(self, outputs, labels):
        self.calls += 1
        return torch.nn.functional.cross_entropy(outputs, labels)


def trained_by(loss, **options):
    inputs, labels = data(5)
    batches = list(zip(inputs.split(16), labels.split(16), strict=True))
    return hs.Training(batches, loss, epochs=3, evaluate_every=1, checkpoint_every=2, **options)


@pytest.mark.slow
def test_a_budget_in_minutes_scores_what_was_trained_and_a_larger_one_goes_on(tmp_path, monkeypatch):
    unbroken = climb(tmp_path / "unbroken", training=trained_by(CountingLoss()), rungs=("ptq", "qat"))
    loss = CountingLoss()
    with monkeypatch.context() as patch:
        patch.setattr(hs.Budget, "spent", lambda *_: "1.0 of 1 minutes" if loss.calls >= 5 else "")
        options = {"training": trained_by(loss), "rungs": ("ptq", "qat"), "budget": hs.Budget(minutes=1)}
        first = climb(tmp_path / "run", tmp_path / "marks", **options)
    assert first.path[-1].note == "the budget is spent: 1.0 of 1 minutes"
    # One call is the look at the first batch before anything else.
    assert "QAT, step 4" in [made.what for made in first.history] and loss.calls == 5
    marks = len((tmp_path / "marks").read_text())
    loss = CountingLoss()
    again = climb(tmp_path / "run", tmp_path / "marks", training=trained_by(loss), rungs=("ptq", "qat"))
    assert loss.calls == 1 + 24 - 4
    assert [made.what for made in again.history if made.rung == "qat"][-3:] == [
        "QAT, step 8",
        "QAT, step 16",
        "QAT, step 24",
    ]
    files = [sum(made.rung == "deployed" for made in outcome.history) for outcome in (first, again)]
    # Three scores, and the file's if it is another one.
    assert len((tmp_path / "marks").read_text()) - marks == (3 + files[1] - files[0]) * BATCHES
    assert again.path[0] == first.path[0] and again.score >= unbroken.score - 0.05


def test_a_finished_rung_is_restored_not_replayed(unbroken, tmp_path, monkeypatch):
    shutil.copytree(unbroken.folder, tmp_path / "run")
    for work in (
        "halfstep.ladder.ptq.sweep",
        "halfstep.ladder.ptq.repair",
        "halfstep.ladder.sensitivity.rank",
    ):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("done before"))
    monkeypatch.setattr("halfstep.ladder.beginning.observe", lambda *_: pytest.fail("observed before"))
    climb(tmp_path / "run", tmp_path / "marks")
    assert figures(tmp_path / "run") == figures(unbroken.folder)


def in_narrow_process(folder, code):
    """Run code with fewer instructions than this process has: its sums differ in their last bits."""
    if not narrower():
        pytest.skip("no narrower instruction set is known for this processor")
    here = torch.backends.cpu.get_cpu_capability()
    check = f"import torch; assert torch.backends.cpu.get_cpu_capability() != {here!r}\n"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", check + code],
        env={**os.environ, **narrower(), "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_run_goes_on_with_other_instructions(tmp_path):
    options = {"rungs": ("ptq", "partial"), "training": None}
    climb(tmp_path / "unbroken", **options)
    whole = [entry.kind for entry in read(tmp_path / "unbroken")]
    folders = []
    for place in (whole.index("sweep"), whole.index("ranking") + 1):
        folders.append(tmp_path / str(place))
        shutil.copytree(tmp_path / "unbroken", folders[-1])
        lines = (folders[-1] / FILE).read_bytes().splitlines(keepends=True)
        (folders[-1] / FILE).write_bytes(b"".join(lines[:place]))
    names = [folder.name for folder in folders]
    in_narrow_process(tmp_path, f"from climbing import climb; [climb(name, **{options}) for name in {names}]")
    for folder in folders:
        assert figures(folder) == figures(tmp_path / "unbroken")


class KilledLoss(CountingLoss):
    """Killed before a step, which is no part of what it is."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def __call__(self, outputs, labels):
        if self.calls == self.step:
            raise Killed
        return super().__call__(outputs, labels)


@pytest.mark.slow
def test_a_training_goes_on_with_other_instructions(tmp_path):
    with pytest.raises(Killed):
        climb(tmp_path / "run", training=trained_by(KilledLoss(5)), rungs=("ptq", "qat"))
    in_narrow_process(
        tmp_path,
        "from test_resuming import KilledLoss, climb, trained_by\n"
        "climb('run', training=trained_by(KilledLoss(-1)), rungs=('ptq', 'qat'))",
    )
    found = [entry.data["measured"]["finding"] for entry in read(tmp_path / "run") if entry.kind == "finding"]
    assert found[-1]["resumed_at"] == 4 and found[-1]["steps"] == 24


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
    with pytest.raises(
        RunError, match=f"belongs to a run with another {what}( \\(.*\\))?; choose another directory"
    ):
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
