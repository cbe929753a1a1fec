"""A run's network comes back from its directory: the outcome's, whatever the climb tried after it."""

import json

import numpy as np
import pytest
import torch
from onnx import load

from halfstep.cli.job import restore
from halfstep.ladder import costs as tuning
from halfstep.runtime.deployed import DeployedModel
from tests.cli.commands import halfstep

MODEL = """
import torch
from torch import nn

def net(layers=4):
    torch.manual_seed(0)
    body = [part for i in range(layers) for part in (nn.Linear(16 if i else 4, 16), nn.ReLU())]
    model = nn.Sequential(*body, nn.Linear(16, 5))
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=0.5)
    return model.eval()

def other():
    return net(3)

def loss(outputs, labels):
    return 0.0 * outputs.sum()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep.py").write_text(MODEL)
    namespace: dict = {}
    exec(MODEL, namespace)
    inputs = torch.randn(384, 4, generator=torch.Generator().manual_seed(1))
    labels = namespace["net"]()(inputs).argmax(1)
    for name, part in {"lab": slice(0, 256), "cal": slice(256, 384)}.items():
        np.savez(tmp_path / f"{name}.npz", inputs=inputs[part].numpy(), labels=labels[part].numpy())
    return tmp_path


def run(folder, *more, ends=(0, 3)):
    sources = (
        "deep:net",
        "--labelled",
        "lab.npz",
        "--calibration",
        "cal.npz",
        "--directory",
        "run",
        "--threads",
        "1",
    )
    done = halfstep(folder, "quantize", *sources, *more)
    assert done.returncode in ends, done.stderr
    return done


def answers(file):
    return DeployedModel(file, threads=1)(torch.from_numpy(np.load(file.parent / "lab.npz")["inputs"]))


def test_the_outcome_is_exported_and_verified_though_a_later_rung_ended_elsewhere(folder):
    (folder / "spare.yaml").write_text(
        "model: deep:net\nlabelled: lab.npz\ncalibration: cal.npz\nmax_drop: 0.02\ndirectory: run\nthreads: 1\n"
        "recipe: {weights: 2, per_tensor: true}\n"
        "training: {data: cal.npz, loss: 'deep:loss', epochs: 0.5, learning_rate: 1e-8}\n"
    )
    halfstep(folder, "quantize", "spare.yaml")
    record = json.loads((folder / "run" / "outcome.json").read_text())
    assert [step["rung"] for step in record["path"]] == ["ptq", "partial", "qat"]
    assert record["rung"] == "partial" and record["float_layers"]  # QAT learned nothing
    done = halfstep(folder, "export", "run", "again.onnx")
    assert done.returncode == 0 and f"score {record['score']:.4f}" in done.stdout
    (folder / "model.onnx").write_bytes((folder / "run" / "model.onnx").read_bytes())
    assert torch.equal(answers(folder / "again.onnx"), answers(folder / "model.onnx"))
    done = halfstep(folder, "verify", "run", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["parity"]["sqnr"] > 30
    done = halfstep(folder, "verify", "run", "--rung", "qat")  # the file is not of that rung
    assert done.returncode == 3, done.stderr


@pytest.mark.slow
def test_what_is_left_in_float_for_speed_is_exported_so(folder, monkeypatch):
    monkeypatch.setattr(
        tuning,
        "microseconds",
        lambda model, groups, *_, **__: [-1.0 if "2" in group.layers else 1.0 for group in groups],
    )
    run(folder, "--tune", "--max-drop", "0.1", "--rungs", "ptq")
    record = json.loads((folder / "run" / "outcome.json").read_text())
    assert record["float_layers"] == ["2"]
    assert halfstep(folder, "export", "run", "again.onnx").returncode == 0
    codes = [
        [node.op_type for node in load(file).graph.node]
        for file in (folder / "again.onnx", folder / "run" / "model.onnx")
    ]
    assert codes[0] == codes[1]
    assert halfstep(folder, "export", "run", "untuned.onnx", "--rung", "ptq").returncode == 0
    assert [node.op_type for node in load(folder / "untuned.onnx").graph.node] != codes[0]


@pytest.mark.slow
def test_the_last_call_counts_and_the_report_says_what_it_asked_for(folder):
    few = ("--weight-bits", "2", "--max-drop", "0.02")
    scores = {}
    for rungs in ("ptq", "ptq,partial", "ptq"):
        run(folder, *few, "--rungs", rungs)
        scores[rungs] = json.loads((folder / "run" / "outcome.json").read_text())["score"]
        done = halfstep(folder, "export", "run", "again.onnx")
        assert f"score {scores[rungs]:.4f}" in done.stdout
        halfstep(folder, "report", "run", "--output", "page.html")
        page = (folder / "page.html").read_text()
        assert ('data-figure="step partial"' in page) == ("partial" in rungs)
        assert f'data-figure="score" data-value="{scores[rungs]!r}"' in page
    assert scores["ptq"] < scores["ptq,partial"]
    done = halfstep(folder, "export", "run", "again.onnx", "--rung", "partial")
    assert f"score {scores['ptq,partial']:.4f}" in done.stdout


def test_what_an_interrupted_run_has_finished_can_be_exported(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    few = ("--weight-bits", "2", "--max-drop", "0.02")
    monkeypatch.setattr("halfstep.ladder.partial.climb_partial", interrupted)
    assert run(folder, *few, ends=(130,)).returncode == 130
    done = halfstep(folder, "export", "run", "ptq.onnx")
    assert done.returncode == 0 and "written to ptq.onnx: PTQ" in done.stdout
    done = halfstep(folder, "export", "run", "ptq.onnx", "--rung", "partial")
    assert done.returncode == 2
    assert "run: has no finished rung 'partial'; finished are 'ptq'" in done.stderr


def test_what_is_not_of_the_run_is_refused(folder):
    run(folder, "--max-drop", "0.1", "--rungs", "ptq")
    config = folder / "run" / "config.yaml"
    before = config.read_text()
    assert run(folder, "--max-drop", "0.2", ends=(2,)).returncode == 2
    assert config.read_text() == before  # another run's command changes nothing
    config.write_text(before.replace("deep:net", "deep:other"))
    done = halfstep(folder, "export", "run", "again.onnx")
    assert done.returncode == 2
    assert "run: its checkpoint is not of the network that 'deep:other' returns now: " in done.stderr


def test_a_baseline_holds_later_runs_to_what_was_recorded(folder):
    (folder / "held.yaml").write_text(
        "model: deep:net\nlabelled: lab.npz\ncalibration: cal.npz\nmax_drop: 0.1\ndirectory: run\nthreads: 1\n"
        "recipe: {float_layers: ['2']}\nrungs: [ptq]\n"
    )
    halfstep(folder, "quantize", "held.yaml")
    recorded = json.loads((folder / "run" / "outcome.json").read_text())
    assert recorded["environment"]["onnxruntime"] and recorded["saturable"] is not None
    done = halfstep(folder, "verify", "run", "--baseline", "run/outcome.json")
    assert done.returncode == 0, done.stdout
    next(layer for layer in recorded["layers"] if layer["name"] == "2")["integer"] = True
    recorded["parity"]["top1"] = 1.5  # no file can
    (folder / "better.json").write_text(json.dumps(recorded))
    done = halfstep(folder, "verify", "run", "--baseline", "better.json")
    assert done.returncode == 3
    assert "failed: layer '2' ran on integers and is in float now: left in float by the recipe" in done.stdout
    assert "answers are the simulation's, 150.00% were" in done.stdout
    failures = json.loads(halfstep(folder, "verify", "run", "--json", "--baseline", "better.json").stdout)[
        "failures"
    ]
    assert len(failures) == 2
    for text, message in (("{}", "needed the outcome.json of one"), ("{", "cannot be read")):
        (folder / "none.json").write_text(text)
        done = halfstep(folder, "verify", "run", "--baseline", "none.json")
        assert done.returncode == 2 and message in done.stderr


def test_a_run_keeps_the_weights_that_the_processor_of_its_beginning_needed(folder, monkeypatch):
    """Though the one that it goes on with needs others."""
    for need in (True, False):
        monkeypatch.setattr("halfstep.ladder.prepare.saturates_here", lambda need=need: need)
        there = ("--max-drop", "0.1", "--rungs", "ptq", "--directory", f"run{need}")
        run(folder, *there)
        journal = (folder / f"run{need}" / "journal.jsonl").read_text()
        assert ("weights have 7 bits instead of 8" in journal) == need
        monkeypatch.setattr("halfstep.ladder.prepare.saturates_here", lambda need=need: not need)
        run(folder, *there)  # goes on
        monkeypatch.chdir(folder)
        model, _, _ = restore(folder / f"run{need}", None)
        weights = {site.format.bits for site in model.placement.sites if site.is_weight}
        assert weights == {7 if need else 8}
