"""The command line: what it prints, what it leaves, and how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import halfstep as hs

MODEL = """
import torch
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
    np.savez(folder / "empty.npz", inputs=inputs[:0], labels=labels[:0])
    np.savez(folder / "nan.npz", inputs=np.full((64, 4), np.nan, np.float32))
    np.savez(folder / "wide.npz", inputs=np.ones((64, 5), np.float32))
    np.savez(folder / "objects.npz", inputs=np.array([{}], dtype=object), labels=labels)
    (folder / "broken.npz").write_bytes(b"no zip")
    return folder


def halfstep(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "halfstep.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(hs.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


def quantize(folder, model="mine:net", labelled="good.npz", calibration="good.npz", *more):
    return halfstep(folder, "quantize", model, "--labelled", labelled, "--calibration", calibration, *more)


def test_quantize_and_inspect(folder):
    done = quantize(folder, "mine:net", "good.npz", "good.npz", "--directory", "run", "--max-drop", "0.2")
    assert done.returncode == 0, done.stderr
    assert "deployed score" in done.stdout
    names = {file.name for file in (folder / "run").iterdir()}
    assert names >= {"model.onnx", "float.onnx", "outcome.json", "journal.jsonl"}
    done = halfstep(folder, "inspect", "run/model.onnx")
    assert done.returncode == 0, done.stderr
    assert "integer kernels: 2; float operators that multiply: 0" in done.stdout
    assert "halfstep.target: onnxruntime" in done.stdout
    done = halfstep(folder, "inspect", "run/model.onnx", "--target", "tensorrt")
    assert done.returncode == 3, done.stderr
    assert "tensorrt: refused, biases" in done.stdout


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
    two_bits = ("--weight-bits", "2", "--max-drop", "0", "--directory", "missed")
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
        (("mine:net", "objects.npz"), "cannot be read as an .npz of plain arrays"),
        (("mine:net", "broken.npz"), "cannot be read as an .npz of plain arrays"),
        (("mine:net", "good.npz", "nan.npz"), "values are NaN"),
        (("mine:net", "good.npz", "empty.npz"), "needed at least one"),
        (("mine:net", "good.npz", "wide.npz"), "cannot be captured"),
        (("mine:net", "good.npz", "good.npz", "--weights", "good.npz"), "weights good.npz"),
        (("mine:net", "good.npz", "good.npz", "--directory", "mine.py/run"), "cannot be written"),
        (("mine:net", "good.npz", "good.npz", "--weight-bits", "1"), "bits: got 1, needed 2 to 16"),
    ],
)
def test_bad_input_ends_in_one_line_and_2(folder, arguments, message):
    done = quantize(folder, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert message in done.stderr


def test_help_names_every_command_and_the_exit_codes(folder):
    done = halfstep(folder, "--help")
    for word in ("demo", "quantize", "inspect", "Exit codes: 0 target met, 3 target not met, 2 bad input"):
        assert word in done.stdout
