"""A model in half precision on the command line."""

import json

import numpy as np
import torch

from tests.cli.commands import halfstep, words_of

HEARD = "The model is handed over in torch.bfloat16 and computed in torch.float32 from here on"
MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()

def calibration():
    return [torch.randn(32, 4, generator=torch.Generator().manual_seed(3)).bfloat16()]
"""


def test_the_command_line_takes_it_and_says_so_once(tmp_path):
    (tmp_path / "halved.py").write_text(MODEL)
    inputs = torch.randn(96, 4, generator=torch.Generator().manual_seed(1))
    namespace: dict = {}
    exec(MODEL, namespace)
    with torch.no_grad():
        labels = namespace["net"]()(inputs.bfloat16()).argmax(1)
    np.savez(tmp_path / "t.npz", inputs=inputs.numpy(), labels=labels.numpy())
    for calibration in ("t.npz", "halved:calibration"):
        data = ("--labelled", "t.npz", "--calibration", calibration)
        done = halfstep(
            tmp_path, "quantize", "halved:net", *data, "--max-drop", "0.2", "--threads", "1", "--rungs", "ptq",
            "--weight-bits", "7", "--json", "--fresh",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert words_of(done).count(HEARD) == 1
        assert json.loads(done.stdout)["float_score"] == 1.0
    done = halfstep(tmp_path, "sensitivity", "runs/quantized", "--json")
    assert done.returncode == 0, done.stderr
