"""A module without memory gets its tensors from files, which are mapped: no copy of them is made."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError
from halfstep.graph.mapped import mapped


class Tied(nn.Module):
    """Words whose table is the head's weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("shift", torch.ones(8))

    def forward(self, ids):
        return self.head(torch.relu(self.inner(self.words(ids)) + self.shift))


IDS = torch.arange(12).reshape(3, 4) % 11


@pytest.fixture
def given(tmp_path):
    """The module with its tensors, itself without memory, and two files of them, tied ones once."""
    torch.manual_seed(0)
    real = Tied().eval()
    state = {
        name: tensor.detach().clone() for name, tensor in real.state_dict().items() if name != "head.weight"
    }
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file({name: state.pop(name) for name in ("inner.weight", "inner.bias")}, files[0])
    save_file(state, files[1])
    with torch.device("meta"):
        empty = Tied()
    return real, empty, files


def test_it_answers_as_the_module_with_memory(given):
    real, empty, files = given
    q = hs.prepare(empty, IDS, hs.Recipe.weight_only(4, 16), weights=files)
    assert torch.equal(q(IDS), real(IDS))
    assert all(tensor.is_meta for tensor in empty.parameters())
    assert q.to_float_state_dict().keys() == real.state_dict().keys()
    twin = mapped(empty, files)
    assert twin.head.weight is twin.words.weight and twin.inner.weight.requires_grad


def test_files_do_not_change(given):
    real, empty, files = given
    before = [Path(file).read_bytes() for file in files]
    q = hs.prepare(empty, IDS, weights=files)
    with torch.no_grad():
        q.weight("inner.weight").zero_()
    assert not torch.equal(q(IDS), real(IDS))
    assert [Path(file).read_bytes() for file in files] == before


def test_what_does_not_fit_is_named(given, tmp_path):
    _, empty, files = given
    with pytest.raises(ArgumentError, match=r"weights: no file holds 'words.weight', 'shift', which Tied"):
        hs.prepare(empty, IDS, weights=files[0])
    with pytest.raises(
        ArgumentError, match=r"model Tied has parameters or buffers without memory .* weights='model"
    ):
        hs.prepare(empty, IDS)
    with pytest.raises(ArgumentError, match=r"weights: got files beside several modules, needed one module"):
        hs.prepare({"one": empty}, {"one": IDS}, weights=files)
    other = tmp_path / "other.safetensors"
    save_file({"inner.weight": torch.zeros(8, 9)}, other)
    with pytest.raises(
        ArgumentError, match=re.escape("'inner.weight' of shape (8, 9), needed (8, 8) as Tied has it")
    ):
        hs.prepare(empty, IDS, weights=other)
    save_file({"outer.weight": torch.zeros(1)}, other)
    with pytest.raises(
        ArgumentError, match=r"holds 'outer.weight', which Tied has not; needed .* such as 'shift', 'words"
    ):
        hs.prepare(empty, IDS, weights=[*files, other])
    other.write_text("no tensors")
    with pytest.raises(
        ArgumentError, match=r"other.safetensors cannot be read: .*; needed a file of safetensors"
    ):
        hs.prepare(empty, IDS, weights=other)


WIDTH, DEPTH = 1024, 24  # 4 MiB a layer

MEASURED = """
    import gc, sys, torch
    from pathlib import Path
    from torch import nn
    import halfstep as hs

    def own():  # memory that is no file's, in bytes
        gc.collect()
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(lines["RssAnon"].split()[0])

    x = torch.randn(2, {width})
    hs.prepare(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))  # what is loaded once
    for place, weights in (("meta", Path(sys.argv[1])), ("cpu", None)):
        with torch.device(place):
            model = nn.Sequential(*(nn.Linear({width}, {width}, bias=False) for _ in range({depth})))
        before = own()
        q = hs.prepare(model, x, hs.Recipe.weight_only(4, 64), weights=weights)
        hs.observe(q, [x], device="cpu")
        print(own() - before)
        del q, model
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_mapped_parameters_take_no_memory_of_their_own(tmp_path):
    torch.manual_seed(0)
    tensors = {f"{index}.weight": torch.randn(WIDTH, WIDTH) / 32 for index in range(DEPTH)}
    save_file(tensors, tmp_path / "model.safetensors")
    code = textwrap.dedent(MEASURED.format(width=WIDTH, depth=DEPTH))
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    taken, copied = map(int, done.stdout.split())
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert taken < size / 2
    assert copied > size * 0.9  # the measure sees a copy where there is one
