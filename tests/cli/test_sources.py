"""What the command line names: weights that fit, and data that are not read whole."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from halfstep.cli.sources import (
    check_input,
    find_callable,
    load_inputs,
    load_labelled,
    load_model,
    load_weights,
)
from halfstep.errors import ArgumentError, DataError
from halfstep.progress import listening

X = torch.arange(80.0).reshape(20, 4)
LABELS = torch.arange(20) % 3


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def pair():
    return {"first": net(), "second": net()}


def test_several_modules_are_quantized_from_python():
    with pytest.raises(
        ArgumentError, match=r"returned a dict.*several modules by name are quantized from Python"
    ):
        load_model(f"{__name__}:pair")


class Heard(list):
    """A progress listener that keeps what is said."""

    def start(self, what, total):
        return None

    advance = end = lambda *_: None

    def say(self, sentence):
        self.append(sentence)


@pytest.fixture
def heard():
    said = Heard()
    with listening(said):
        yield said


STATE = net().state_dict()


def prefixed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        (STATE, []),
        (prefixed("module."), ["'module.' is taken off every name"]),
        (prefixed("module._orig_mod."), ["'module.' is taken", "'_orig_mod.' is taken"]),
        ({"state_dict": STATE, "epoch": 3}, ["the state dict is its 'state_dict'"]),
        ({"model": prefixed("module."), "optimizer": {"lr": 0.1}}, ["its 'model'", "'module.' is taken"]),
    ],
)
def test_checkpoints_of_trainings_are_unwrapped_and_it_is_said(tmp_path, heard, checkpoint, said):
    torch.save(checkpoint, tmp_path / "w.pt")
    model = net()
    load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())
    assert len(heard) == len(said)
    assert all(part in sentence for part, sentence in zip(said, heard, strict=True))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.table.weight


def test_a_second_name_of_a_tied_weight_may_be_left_out(tmp_path):
    save_file({"table.weight": torch.ones(8, 4)}, tmp_path / "tied.safetensors")
    model = Tied()
    load_weights(model, tmp_path / "tied.safetensors")
    assert float(model.head.weight.detach().min()) == 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({**STATE, "extra": torch.ones(1)}, r"1 unknown to the model \('extra'\)$"),
        ({**STATE, "2.bias": torch.ones(5)}, r"1 another shape \('2.bias' is \(5,\), needed \(3,\)\)$"),
        ({"0.weight": STATE["0.weight"]}, r"3 missing \('0.bias', '2.weight', '2.bias'\)$"),
        (
            {**prefixed("encoder.layer."), "other": torch.ones(1)},
            r"4 missing \('0.weight', '0.bias', '2.weight', ...\); 5 unknown to the model \('encoder.layer.0.weight', ",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, state, message):
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ArgumentError, match=rf"weights .*w.pt: do not fit Sequential: {message}"):
        load_weights(net(), tmp_path / "w.pt")


def test_weights_that_cannot_be_read(tmp_path):
    def message(name):
        with pytest.raises(ArgumentError) as raised:
            load_weights(net(), tmp_path / name)
        return str(raised.value).replace(str(tmp_path), "")

    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "text.safetensors").write_text("text")
    torch.save(net(), tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    needed = "; needed .safetensors, or what torch.save(model.state_dict(), path) writes"
    assert message("empty.pt") == f"weights /empty.pt: cannot be read: EOFError{needed}"
    assert message("text.pt").startswith("weights /text.pt: cannot be read: ")
    assert message("text.pt").endswith(needed)
    assert message("nowhere.pt") == "weights /nowhere.pt: no such file"
    assert message("nowhere.safetensors") == "weights /nowhere.safetensors: no such file"
    assert message("folder.pt").startswith("weights /folder.pt: cannot be read: IsADirectoryError")
    assert message("text.safetensors").startswith(
        "weights /text.safetensors: cannot be read: SafetensorError"
    )
    assert "save the state dict: torch.save(model.state_dict(), path)" in message("module.pt")
    assert message("list.pt") == "weights /list.pt: holds a list, needed a state dict: names and tensors"


# files


def test_an_uncompressed_file_stays_on_the_disk(tmp_path):
    for save in (np.savez, np.savez_compressed):
        path = tmp_path / f"{save.__name__}.npz"
        save(path, inputs=X.numpy(), labels=LABELS.numpy())
        labelled = load_labelled(str(path), 8)
        assert [len(inputs) for inputs, _ in labelled] == [8, 8, 4]
        assert torch.equal(torch.cat([inputs for inputs, _ in labelled]), X)
        assert torch.equal(torch.cat([labels for _, labels in labelled]), LABELS)
        with open("/proc/self/maps") as maps:
            assert (str(path) in maps.read()) == (save is np.savez)
        labelled[0][0].zero_()  # a model that overwrites its input changes no file
        assert torch.equal(load_inputs(str(path), 20, 20)[0], X)
        del labelled


def test_arrays_in_any_layout_are_read(tmp_path):
    first = np.arange(3, dtype=np.uint8)  # the next one starts at no multiple of 8 bytes then
    for name, inputs in {"fortran": np.asfortranarray(X.numpy()), "long": X.long().numpy()}.items():
        np.savez(tmp_path / f"{name}.npz", first=first, inputs=inputs)
        (batch,) = load_inputs(str(tmp_path / f"{name}.npz"), 20, 20)
        assert torch.equal(batch, torch.from_numpy(inputs))


def test_floats_become_the_models_and_labels_indices(tmp_path, heard):
    path = tmp_path / "t.npz"
    np.savez(path, inputs=X.double().numpy(), labels=LABELS.to(torch.uint8).numpy())
    ((inputs, labels),) = load_labelled(str(path), 20)
    assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(inputs, X) and torch.equal(labels, LABELS)
    assert heard == [
        f"{path}: inputs are torch.float64: converted to torch.float32, which the model computes in"
    ]
    np.savez(path, inputs=X.numpy(), labels=X.double().numpy())
    ((_, labels),) = load_labelled(str(path), 20)
    assert labels.dtype == torch.float32 and "labels are torch.float64" in heard[-1]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            X.to(torch.uint8),
            r"here: the model does not take \(2, 4\) of torch.uint8: RuntimeError: .*float32, scaled as",
        ),
        (X[:, :3], r"here: the model does not take \(2, 3\) of torch.float32: RuntimeError: "),
        ((X, LABELS), r"here: the model does not take .*int64: TypeError: .* arguments .*, and no labels$"),
        (3, r"here: model inputs: got int, needed a tensor"),
        (X / X, r"here: 1 of the first batch's 80 values are NaN"),
    ],
)
def test_what_the_model_does_not_take_is_said_at_the_start(inputs, message):
    check_input(net(), X, "here")
    with pytest.raises(DataError, match=message):
        check_input(net(), inputs, "here")


# callables


def leaves():
    raise SystemExit("bye")


def talks():
    raise RuntimeError("no file\n  at this address " + "x" * 1000)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("leaves", ArgumentError, "raised SystemExit: bye$"),
        ("talks", ArgumentError, "raised RuntimeError: no file at this address x{276} ...$"),
        ("net.nothing", ArgumentError, "has no 'net.nothing'$"),
    ],
)
def test_models_that_cannot_be_loaded(name, error, message):
    with pytest.raises(error, match=f"^'{__name__}:{name}': .*{message}"):
        load_model(f"{__name__}:{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "'resnet': needed this or that$"),
        ("models.py:net", "'models.py:net': got the path of a file, .* imports it by, as models:net$"),
        ("./my/models.py:net", ".* as my.models:net$"),
        ("my/models:net", ".* as my.models:net$"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ArgumentError, match=message):
        find_callable(name, "this or that")


def test_data_may_be_a_file_or_a_callable():
    for load in (lambda name: load_inputs(name, 8, 8), lambda name: load_labelled(name, 8)):
        with pytest.raises(
            ArgumentError, match=r"'data.npy': needed an .npz file, or package.module:callable"
        ):
            load("data.npy")


PASSES = []
USED_UP = iter([X])


def generated():
    PASSES.append("begun")
    for index, batch in enumerate(X.split(8)):
        PASSES.append(index)
        yield batch


def used_up():
    return USED_UP


def loader():
    return DataLoader(TensorDataset(X, LABELS), 5)


def dataset():
    return TensorDataset(X, LABELS)


def array():
    return X


def pairs():
    return [{"x": X[:8], "scale": torch.ones(())}, {"x": X[8:16], "scale": torch.ones(())}]


def nothing():
    return 3


def lengths(batches):
    return [len(batch) for batch in batches]


def test_a_generator_is_begun_anew_for_every_pass_and_taken_no_further_than_needed():
    PASSES.clear()
    batches = load_inputs(f"{__name__}:generated", 64, 10)
    assert lengths(batches) == [8, 2] and PASSES == ["begun", 0, 1]
    assert lengths(batches) == [8, 2] and PASSES == ["begun", 0, 1] * 2
    labelled = load_labelled(f"{__name__}:generated", 64)
    assert lengths(labelled) == lengths(labelled) == [8, 8, 4]


def test_what_can_be_iterated_again_is_used_as_it_is():
    first = next(iter(load_labelled(f"{__name__}:loader", 64)))
    assert len(first[0]) == 5
    assert isinstance(load_labelled(f"{__name__}:loader", 64), DataLoader)
    assert lengths(inputs for inputs, _ in load_labelled(f"{__name__}:dataset", 6)) == [6, 6, 6, 2]
    assert lengths(load_inputs(f"{__name__}:array", 6, 13)) == [6, 6, 1]


def test_a_batch_of_several_inputs_is_cut_where_it_has_examples():
    *_, last = load_inputs(f"{__name__}:pairs", 64, 11)
    assert last["x"].shape == (3, 4) and last["scale"].shape == ()


def test_callables_that_cannot_serve():
    batches = load_inputs(f"{__name__}:used_up", 64, math.inf)
    assert lengths(batches) == [20]
    with pytest.raises(
        DataError, match=r"gave no batch when it was called again: .* begin anew in each call"
    ):
        list(batches)
    with pytest.raises(ArgumentError, match="returned a int, needed an iterable of batches"):
        load_labelled(f"{__name__}:nothing", 64)
