"""The command line: what it prints, what it leaves, and how it ends."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import helper

from halfstep.cli.console import by_name
from halfstep.demo import DigitsNet
from halfstep.errors import ArgumentError
from halfstep.runtime.deployed import DeployedModel
from tests.cli.commands import halfstep
from tests.onnx_in.files import export, write

MODEL = """
import torch
from onnx import helper
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def branching():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Branching()

def number():
    return 3

def confidence(outputs, labels):
    return outputs.softmax(1).gather(1, labels[:, None])[:, 0]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "mine.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((64, 4)).astype(np.float32)
    namespace: dict = {}
    exec(MODEL, namespace)
    labels = namespace["net"]()(torch.from_numpy(inputs)).argmax(1).numpy()  # so float scores 1
    np.savez(folder / "good.npz", inputs=inputs, labels=labels)
    np.savez(folder / "unlabelled.npz", inputs=inputs)
    np.savez(folder / "several.npz", ids=inputs, mask=inputs, labels=labels)
    np.savez(folder / "empty.npz", inputs=inputs[:0], labels=labels[:0])
    np.savez(folder / "nan.npz", inputs=np.full((64, 4), np.nan, np.float32))
    np.savez(folder / "void.npz", inputs=np.full((64, 4), np.nan, np.float32), labels=labels)
    np.savez(folder / "vague.npz", inputs=inputs, labels=np.full(64, np.nan))
    np.savez(folder / "one.npz", inputs=inputs[:1])
    np.savez(folder / "wide.npz", inputs=np.ones((64, 5), np.float32))
    np.savez(folder / "objects.npz", inputs=np.array([{}], dtype=object), labels=labels)
    (folder / "broken.npz").write_bytes(b"no zip")
    return folder


NUMBERS = itertools.count()


def quantize(folder, model="mine:net", labelled="good.npz", calibration="good.npz", *more):
    own = ("--directory", f"runs/{next(NUMBERS)}")
    return halfstep(
        folder, "quantize", model, "--labelled", labelled, "--calibration", calibration, *own, *more
    )


@pytest.fixture(scope="module")
def finished(folder):
    """A run in the directory "run", which tests only read."""
    done = quantize(folder, "mine:net", "good.npz", "good.npz", "--directory", "run", "--max-drop", "0.2")
    assert done.returncode == 0, done.stderr
    return done


def test_quantize_and_inspect(folder, finished):
    done = finished
    assert "deployed score" in done.stdout
    names = {file.name for file in (folder / "run").iterdir()}
    assert names >= {
        "model.onnx",
        "float.onnx",
        "outcome.json",
        "journal.jsonl",
        "report.html",
        "config.yaml",
    }
    assert "the report: run" in done.stdout
    done = halfstep(folder, "inspect", "run/model.onnx")
    assert done.returncode == 0, done.stderr
    assert "integer kernels: 2; float operators that multiply: 0" in done.stdout
    assert "halfstep.target: onnxruntime" in done.stdout
    done = halfstep(folder, "inspect", "run/model.onnx", "--target", "tensorrt")
    assert done.returncode == 3, done.stderr
    assert "tensorrt: refused, biases" in done.stdout
    done = halfstep(folder, "inspect", "run/model.onnx", "--target", "tensorrt", "--json")
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    assert told["target"] == "tensorrt" and told["metadata"]["halfstep.target"] == "onnxruntime"
    assert {site["layer"] for site in told["sites"] if site["constant"]} == {"0/Gemm", "2/Gemm"}
    assert {finding["rule"] for finding in told["findings"] if finding["refused"]} >= {"biases"}


def test_weights_alone_by_a_flag(folder):
    more = ("--recipe", "weight_only", "--weight-bits", "8", "--group", "16", "--max-drop", "0.2")
    done = quantize(folder, "mine:net", "good.npz", "good.npz", "--directory", "packed", *more)
    assert done.returncode == 0, done.stderr
    assert "activations: null" in (folder / "packed" / "config.yaml").read_text()
    told = json.loads(halfstep(folder, "inspect", "packed/model.onnx", "--json").stdout)
    assert [node["operator"] for node in told["float"]] == ["Gemm", "Gemm"]
    done = quantize(folder, "mine:net", "good.npz", "good.npz", "--recipe", "static", "--group", "16")
    assert done.returncode == 2
    assert "recipe: group is 16 beside kind static, needed null" in done.stderr


def test_inspect_holds_a_file_to_the_rules_of_a_target(folder):
    done = quantize(
        folder,
        "mine:net",
        "good.npz",
        "good.npz",
        "--max-drop",
        "0.2",
        "--directory",
        "rt",
        "--target",
        "tensorrt",
    )
    assert done.returncode == 0, done.stderr
    done = halfstep(folder, "inspect", "rt/model.onnx")
    assert done.returncode == 0, done.stderr
    assert "tensorrt: keeps all of its 10 rules" in done.stdout
    done = halfstep(folder, "inspect", "rt/float.onnx", "--target", "nowhere")
    assert done.returncode == 2
    assert "target: got 'nowhere'" in done.stderr


def test_a_target_that_is_missed_ends_with_3(folder):
    two_bits = ("--weight-bits", "2", "--max-drop", "0", "--rungs", "ptq", "--directory", "missed")
    done = quantize(folder, "mine:net", "good.npz", "good.npz", *two_bits)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "NOT met" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mine",), "needed package.module:callable"),
        (("nowhere:net",), "cannot import nowhere"),
        (("mine:nothing",), "mine has no 'nothing'"),
        (("mine:number",), "returned a int, needed a torch.nn.Module"),
        (("mine:branching",), "torch.where"),
        (("mine:net", "missing.npz"), "no such file"),
        (("mine:net", "unlabelled.npz"), "has no array 'labels'; it has 'inputs'"),
        (
            ("mine:net", "several.npz"),
            "has no array 'inputs'; it has 'ids', 'mask', 'labels'; for a network of several",
        ),
        (("mine:net", "objects.npz"), "cannot be read as an .npz of plain arrays"),
        (("mine:net", "broken.npz"), "cannot be read as an .npz of plain arrays"),
        (
            ("mine:net", "good.npz", "nan.npz"),
            "calibration 'nan.npz': 256 of the first batch's 256 values are NaN",
        ),
        (("mine:net", "void.npz"), "labelled 'void.npz': 256 of the first batch's 256 values are NaN"),
        (("mine:net", "vague.npz"), "Accuracy: got labels of torch.float32 with fractions or NaN"),
        (
            ("mine:net", "good.npz", "one.npz"),
            "calibration 'one.npz': got a first batch of 1, needed 2 examples",
        ),
        (("mine:net", "good.npz", "good.npy"), "'good.npy': needed an .npz file, or package.module:callable"),
        (
            ("mine:net", "good.npz", "good.npz", "--metric", "acuracy"),
            "'acuracy': needed accuracy, agreement, cosine, sqnr, or package",
        ),
        (("mine:net", "good.npz", "good.npz", "--max-drop", "2"), "max_drop: got 2, needed at most 1"),
        (("mine:net", "good.npz", "good.npz", "--rungs", "qat"), "(--rungs ptq,qat)"),
        (("mine:net", "good.npz", "empty.npz"), "needed at least one"),
        (
            ("mine:net", "good.npz", "wide.npz"),
            "calibration 'wide.npz': the model does not take (2, 5) of torch.float32: RuntimeError",
        ),
        (("mine:net", "good.npz", "good.npz", "--weights", "good.npz"), "weights good.npz: cannot be read: "),
        (("mine:net", "good.npz", "good.npz", "--directory", "mine.py/run"), "cannot be written"),
        (
            ("mine:net", "good.npz", "good.npz", "--dynamic", "input=features"),
            "--dynamic: got 'input=features', needed INPUT:DIMENSION=NAME",
        ),
        (
            ("mine:net", "good.npz", "good.npz", "--state", "h_in"),
            "--state: got 'h_in', needed INPUT=OUTPUT, such as h_in=h_out",
        ),
        (
            ("mine:net", "good.npz", "good.npz", "--float-from", "decode"),
            "float_from: got 'decode', needed a module or an operator of the network",
        ),
        (
            ("mine:net", "good.npz", "good.npz", "--dynamic", "x:1=features"),
            "dynamic: got input 'x', needed one of 'input'",
        ),
        (
            ("mine:net", "good.npz", "good.npz", "--dynamic", "input:1=features"),
            "fixes dimension 1 of input 'input', which is to vary, at the example's 4",
        ),
        (
            ("mine:net", "good.npz", "good.npz", "--weight-bits", "1"),
            "command line: recipe.weights is 1, needed greater",
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_2(folder, arguments, message):
    done = quantize(folder, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert message in done.stderr


def test_a_run_can_be_exported_verified_reported_and_compared(folder, finished):
    done = halfstep(folder, "export", "run", "again.onnx")
    assert done.returncode == 0, done.stderr
    exported, deployed = (DeployedModel(folder / file) for file in ("again.onnx", "run/model.onnx"))
    inputs = torch.from_numpy(np.load(folder / "good.npz")["inputs"])
    assert torch.equal(exported(inputs), deployed(inputs))
    done = halfstep(folder, "verify", "run", "--json")
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)
    assert proof["parity"]["top1"] > 0.9 and {"0", "2"} <= proof["microseconds"].keys()
    done = halfstep(folder, "report", "run", "--output", "page.html")
    assert done.returncode == 0 and (folder / "page.html").read_text().startswith("<!DOCTYPE html>")
    done = halfstep(folder, "compare", "run", "run", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    assert rows["state"] == {"what": "state", "first": "target met", "second": "target met"}
    done = halfstep(folder, "export", "run", "again.onnx", "--rung", "qat")
    assert done.returncode == 2 and "has no finished rung 'qat'; finished are 'ptq'" in done.stderr
    done = halfstep(folder, "report", "nowhere")
    assert done.returncode == 2 and "needed the directory of a run" in done.stderr


def test_several_metrics_by_name(folder):
    several = (
        "--metric",
        "accuracy=accuracy",
        "--metric",
        "sure=mine:confidence",
        "--max-drop",
        "accuracy=0.2",
    )
    done = quantize(folder, "mine:net", "good.npz", "good.npz", *several, "--floor", "sure=0.1", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert [(m["metric"], m["met"]) for m in record["metrics"]] == [("accuracy", True), ("sure", True)]
    assert record["max_drop"] == 0.2
    done = quantize(folder, "mine:net", "good.npz", "good.npz", *several, "--floor", "shure=0.1")
    assert done.returncode == 2
    assert (
        "floor: got the name 'shure', needed one of 'accuracy', 'sure'; did you mean 'sure'?" in done.stderr
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["much"], "--max-drop: got much, needed a number, or NAME=NUMBER"),
        (["0.1", "0.2"], "--max-drop: got 0.1, 0.2, needed NAME=VALUE for each of several metrics"),
        (["a=0.1", "a=0.2"], "--max-drop: got a=0.1, a=0.2, needed NAME=VALUE"),
    ],
)
def test_flags_by_name_that_cannot_be(given, message):
    with pytest.raises(ArgumentError, match=message):
        by_name("--max-drop", given, float)


def test_a_way_for_an_unknown_metric_is_refused(folder):
    (folder / "ways.yaml").write_text(
        "model: mine:net\nlabelled: good.npz\ncalibration: good.npz\nhigher_is_better: {loss: false}\n"
    )
    done = halfstep(folder, "quantize", "ways.yaml")
    assert done.returncode == 2
    assert "higher_is_better: got the name 'loss', needed true or false" in done.stderr


def test_init_writes_a_configuration_that_quantize_takes(folder):
    done = halfstep(folder, "init", "mine:net", "--labelled", "good.npz", "--calibration", "good.npz")
    assert done.returncode == 0, done.stderr
    text = (folder / "halfstep.yaml").read_text()
    assert "#   0\n#   2\n" in text  # the layers
    done = halfstep(folder, "init", "mine:net")
    assert (
        done.returncode == 2
        and "halfstep.yaml exists; choose another --output, or give --force" in done.stderr
    )
    done = halfstep(
        folder, "quantize", "halfstep.yaml", "--max-drop", "0.2", "--directory", "from config", "--json"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["met"] and record["max_drop"] == 0.2
    done = halfstep(folder, "calibrate", "halfstep.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert {"activations", "weights", "kl", "sqnr"} <= set(json.loads(done.stdout)[0])
    done = halfstep(folder, "sensitivity", "halfstep.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert sorted(name for row in json.loads(done.stdout)["rows"] for name in row["layers"]) == ["0", "2"]


def test_an_interrupted_run_says_how_to_go_on(folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("halfstep.ladder.quantize.ascend", interrupted)
    done = quantize(folder, "mine:net", "good.npz", "good.npz", "--directory", "stopped", "--max-drop", "0.2")
    assert done.returncode == 130
    assert (
        "interrupted; to go on where it stopped: halfstep quantize mine:net --labelled good.npz"
        in done.stderr
    )
    monkeypatch.undo()
    done = quantize(folder, "mine:net", "good.npz", "good.npz", "--directory", "stopped", "--max-drop", "0.2")
    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_a_program(folder):
    done = subprocess.run(
        [sys.executable, "-m", "halfstep.cli", "quantize", "mine", "--labelled", "a", "--calibration", "b"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: 'mine': needed package.module:callable" in done.stderr


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 3)])
def test_the_demo_ends_as_every_climb_does(folder, monkeypatch, met, code):
    climbed = {}

    def climb(model, example_inputs, **options):
        climbed.update(options)
        return SimpleNamespace(met=met, directory=None, to_dict=lambda: {"met": met})

    monkeypatch.setattr("halfstep.demo.train_digits", lambda digits, **_: DigitsNet())
    monkeypatch.setattr("halfstep.ladder.quantize.quantize", climb)
    done = halfstep(folder, "demo", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (code, {"met": met})
    assert climbed["command"] == "halfstep demo"


def test_a_doubt_is_printed_once(folder, finished):
    assert finished.stderr.replace("\n", " ").count("calibration examples are also among the 64") == 1


def test_help_names_every_command_and_the_exit_codes(folder):
    done = halfstep(folder, "--help")
    commands = "demo init quantize sensitivity calibrate export verify inspect report compare"
    for word in (*commands.split(), "Exit codes: 0 target met, 3 target not met, 2 bad input"):
        assert word in done.stdout


def test_an_onnx_file_is_quantized(folder, tmp_path):
    namespace: dict = {}
    exec(MODEL, namespace)
    export(namespace["net"](), torch.randn(1, 4), folder / "net.onnx", fixed=True)  # whose batch becomes any
    arguments = ("--labelled", "good.npz", "--calibration", "unlabelled.npz", "--max-drop", "0.1", "--json")
    done = halfstep(folder, "quantize", "net.onnx", *arguments, "--directory", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["float_score"] == 1.0
    assert DeployedModel(tmp_path / "run" / "model.onnx")(torch.randn(3, 4)).shape == (3, 3)
    verified = halfstep(folder, "verify", tmp_path / "run")
    assert verified.returncode == 0, verified.stderr


def test_the_layers_of_an_onnx_file_are_listed_by_their_nodes(folder, tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="/encoder/fc/MatMul")]
    stored = {"w": np.ones((4, 3), np.float32)}
    write(tmp_path / "m.onnx", nodes, {"x": ["batch", "tokens", 4]}, {"y": ["batch", "tokens", 3]}, stored)
    done = halfstep(folder, "init", tmp_path / "m.onnx", "--output", tmp_path / "halfstep.yaml")
    assert done.returncode == 0, done.stderr
    assert "#   /encoder/fc/MatMul" in (tmp_path / "halfstep.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.onnx",), "none.onnx: no such file"),
        (("net.onnx", "--weights", "w.safetensors"), "an ONNX file holds its own"),
    ],
)
def test_an_onnx_file_that_cannot_be_taken(folder, arguments, words):
    done = halfstep(
        folder, "quantize", *arguments, "--labelled", "good.npz", "--calibration", "unlabelled.npz"
    )
    assert done.returncode == 2 and words in " ".join(done.stderr.split())
