"""Capture: what goes in comes out, the user's model stays as it was, and errors name the place."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm
from torch.utils import _pytree as pytree

import halfstep as hs
from halfstep.errors import ArgumentError, CaptureError, DataError
from halfstep.graph.capture import capture, relative_error
from halfstep.graph.inputs import path_name


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        if y.sum() > 0:
            return y
        return -y


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.fc = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y = self.fc(x)
        y += x
        y.mul_(self.scale)
        return self.dropout(self.relu(y))


class TwoInTwoOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, a, b):
        return {"sum": self.fc(a + b), "difference": self.fc(a) - b}


def test_in_place_operators_and_dropout_give_the_models_own_outputs():
    model = InPlace().eval()
    x = torch.randn(3, 4)
    captured = capture(model, x)
    for batch in (3, 1, 7):
        x = torch.randn(batch, 4)
        assert torch.equal(captured(x), model(x))


def test_the_users_model_is_left_untouched():
    model = InPlace().train()
    before = copy.deepcopy(model.state_dict())
    capture(model, torch.randn(3, 4))
    assert model.training
    assert model.dropout.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Normalising(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x -= 0.5
        return self.fc(x.mul_(2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inputs_that_the_model_writes_into_stay_as_they_are(dtype):
    model, x = Normalising().eval().to(dtype), torch.randn(3, 4, dtype=dtype)
    before = x.clone()
    captured = capture(model, x)
    theirs = captured.handed_over or model
    for network in (captured, captured.handed_over or captured):
        assert torch.equal(network(x), network(x))
        assert torch.equal(x, before)
    assert relative_error(captured(x), theirs(x.clone()).float()) < 1e-2


def pruned():
    layer = nn.Linear(4, 4)
    return prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize(
    "layer", [pruned, lambda: spectral_norm(nn.Linear(4, 4))], ids=["pruned", "spectral"]
)
def test_weights_that_are_computed_at_each_call_are_captured(layer):
    model, x = nn.Sequential(layer(), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(3, 4)
    wanted = model(x)
    assert model[0].weight.grad_fn is not None  # torch copies no tensor with a history
    captured = capture(model, x)
    assert relative_error(captured(x), wanted) < 1e-6
    assert model[0].weight.grad_fn is not None


def test_what_is_no_float_network_in_python_is_refused():
    x, network = torch.randn(3, 4), nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.warns(), pytest.raises(CaptureError, match=r"is TorchScript, .*hand over the module"):
        capture(torch.jit.trace(network, x), x)
    with pytest.warns(), pytest.raises(CaptureError, match=r"is quantized already: '0' is a .*dynamic"):
        capture(torch.ao.quantization.quantize_dynamic(network, {nn.Linear}), x)
    with pytest.raises(ArgumentError, match=r"is a QuantizedModel already; .*the float model"):
        hs.prepare(hs.prepare(network, x), x)


def test_parameters_keep_their_names():
    captured = capture(Wrapper(InPlace()), torch.randn(3, 4))
    assert set(captured.module.state_dict()) == {"inner.scale", "inner.fc.weight", "inner.fc.bias"}


def test_keyword_inputs_and_dict_outputs():
    model = TwoInTwoOut()
    inputs = {"a": torch.randn(2, 4), "b": torch.randn(2, 4)}
    got, wanted = capture(model, inputs)(**inputs), model(**inputs)
    assert list(got) == ["sum", "difference"]
    assert all(torch.equal(got[key], wanted[key]) for key in got)


def test_control_flow_on_data_names_module_and_line():
    with pytest.raises(CaptureError, match=r"module 'inner', .*test_capture\.py:\d+: .*torch\.where"):
        capture(Wrapper(Branching()), torch.randn(2, 4))


def test_a_batch_of_one_is_refused():
    with pytest.raises(CaptureError, match=r"got a batch of 1, needed at least 2"):
        capture(nn.Linear(4, 4), torch.randn(1, 4))


def test_parameters_that_are_not_finite_are_named():
    model = Wrapper(nn.Linear(4, 4))
    model.inner.weight.data[0, 0] = float("nan")
    with pytest.raises(CaptureError, match=r"'inner.weight': 1 of 16 values are NaN or infinite"):
        capture(model, torch.randn(2, 4))


def test_averages_that_are_no_numbers_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].running_var[2] = float("nan")
    with pytest.raises(CaptureError, match=r"buffer '1.running_var': 1 of 4 values are NaN"):
        capture(model, torch.randn(3, 4))


def test_inputs_that_the_model_itself_does_not_take_are_told_from_what_cannot_be_traced():
    with pytest.raises(CaptureError, match=r"the model itself fails on example_inputs: give what model\("):
        capture(nn.Linear(4, 4), torch.randn(3, 5))


def test_a_fixed_batch_size_is_explained():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 4)

    with pytest.raises(CaptureError, match=r"fixes the batch size"):
        capture(Fixed(), torch.randn(2, 4))


def test_a_batch_size_that_an_exported_module_fixes_is_explained():
    x = torch.randn(2, 4)
    exported = torch.export.export(nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten()).eval(), (x,)).module()
    with pytest.raises(CaptureError, match=r"fixes the batch size at the example's 2: ") as caught:
        capture(nn.Sequential(exported, nn.Linear(4, 3)), x)
    _, advice = str(caught.value).split("; ")
    assert advice == (
        "that code was generated when the module was exported, for this size: export it anew with "
        "dynamic_shapes={'input': {0: torch.export.Dim.DYNAMIC}}, or hand over the module that it was made from"
    )


def test_a_random_model_is_told_from_a_wrong_capture():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(CaptureError, match=r"answers differently when asked twice"):
        capture(Noisy(), torch.randn(2, 4))


def test_inputs_without_tensors_are_refused():
    with pytest.raises(DataError, match=r"needed at least one tensor"):
        capture(nn.Identity(), ())


def test_wrong_shape_and_type_are_named():
    captured = capture(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(DataError, match=r"got shape \(2, 5\), needed \(batch, 4\)"):
        captured.check_inputs([torch.randn(2, 5)])
    with pytest.raises(DataError, match=r"got torch.float64, needed torch.float32"):
        captured.check_inputs([torch.randn(2, 4).double()])


def test_relative_error_of_equal_tensors_with_nan_is_zero():
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert relative_error(x, x.clone()) == 0.0
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")


class Added(nn.Module):
    def forward(self, x, table):
        return x + table.mean(0)


def test_examples_are_selected_by_what_was_captured_as_a_batch():
    captured = capture(Added(), (torch.randn(4, 3), torch.randn(7, 3)))
    x, table = torch.randn(7, 3), torch.randn(7, 3)  # as long as the batch, and none all the same
    chosen = captured.select((x, table), torch.tensor([0, 1, 0]))
    assert torch.equal(chosen[0], x[[0, 1, 0]])
    assert chosen[1] is table


class Scaled(nn.Module):
    """What happens to have the size of the batch: a table that is averaged, one of fixed size, one that is unused."""

    def forward(self, x, table, fixed, unused):
        return x + table.mean(0) + fixed.reshape(12)[:3]


class Towers(nn.Module):
    def forward(self, x, y):
        return {"x": x * 2, "y": y + 1}


def test_the_batch_is_what_varies_with_the_first_input_and_not_what_has_its_size_by_chance():
    inputs = tuple(torch.randn(4, 3) for _ in range(4))
    captured = capture(Scaled(), inputs)
    assert captured.batched == (True, False, False, False)
    chosen = captured.examples(inputs, 0, 2)
    assert torch.equal(chosen[0], inputs[0][:2])
    assert all(part is whole for part, whole in zip(chosen[1:], inputs[1:], strict=True))
    wanted = Scaled()(*chosen)
    assert torch.equal(captured(*chosen), wanted)
    captured.check_inputs([torch.randn(9, 3), torch.randn(7, 3), inputs[2], torch.randn(9, 3)])
    with pytest.raises(DataError, match=r"input 'fixed': got shape \(9, 3\), needed \(4, 3\)"):
        captured.check_inputs([torch.randn(9, 3), inputs[1], torch.randn(9, 3), inputs[3]])


class Indexed(nn.Module):
    """Rows of a mask are fetched by the numbers of the examples, which the tracing does not tie together."""

    def forward(self, x, mask, keys, values):
        rows = torch.arange(x.shape[0])
        return x * mask[rows] + (keys * values).mean(0)


def test_what_indices_tie_to_the_batch_is_batched():
    inputs = tuple(torch.randn(4, 3) for _ in range(4))
    assert capture(Indexed(), inputs).batched == (True, True, False, False)


def test_two_inputs_with_outputs_of_their_own_are_both_batched():
    assert capture(Towers(), (torch.randn(4, 3), torch.randn(4, 5))).batched == (True, True)
    assert capture(TwoInTwoOut(), {"a": torch.randn(2, 4), "b": torch.randn(2, 4)}).batched == (True, True)


def test_example_inputs_of_another_type_are_explained():
    with pytest.raises(
        CaptureError, match=r"example_inputs hold a torch.float64.*torch.float32.*x\.float\(\)"
    ):
        capture(nn.Linear(4, 4), torch.randn(2, 4).double())


class Normalised(nn.Module):
    """Computes in float64 in between, as codes of positions do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.rand(4, dtype=torch.float64))

    def forward(self, x):
        y = (self.a(x).double() - self.mean) * self.mean.abs()
        return self.b(y.float()), y


def test_what_is_computed_in_float64_stays_so():
    x = torch.randn(3, 4)
    q = hs.prepare(Normalised(), x)
    hs.observe(q, [x])
    hs.calibrate(q)
    assert q(x)[1].dtype is torch.float64
    assert {layer.name: bool(layer.sites) for layer in q.layers} == {"a": True, "b": True}


@dataclass
class Record:
    logits: torch.Tensor


class Recorded(nn.Module):
    def forward(self, x):
        return Record(x * 2)


def test_a_record_that_torch_does_not_know_is_explained():
    with pytest.raises(CaptureError, match=r"return a tuple or dict instead.*register_dataclass"):
        capture(Recorded(), torch.randn(2, 4))


def test_values_are_called_as_the_fields_of_records():
    path = (pytree.MappingKey("heads"), pytree.SequenceKey(1), pytree.GetAttrKey("logits"))
    assert path_name(path) == "heads_1_logits"


class Extras(nn.Module):
    def forward(self, x):
        return {"loss": None, "logits": x * 2, "kind": "linear", "rows": x.shape[0], "three": 3}


def test_outputs_that_are_no_tensors_are_handed_back():
    captured = capture(Extras(), torch.randn(2, 4))
    x = torch.randn(5, 4)
    got, wanted = captured(x), Extras()(x)
    assert torch.equal(got.pop("logits"), wanted.pop("logits"))
    assert got == wanted == {"loss": None, "kind": "linear", "rows": 5, "three": 3}
    assert captured.out_spec.names() == ["logits", "rows"]


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        return torch.cond(y.sum() > 0, lambda z: z + 1, lambda z: z - 1, (y,))


@torch.no_grad()
def test_a_branch_of_torch_cond_is_part_of_the_graph():
    model, x = Conditional().eval(), torch.randn(3, 4)
    q = hs.prepare(model, x)
    assert {name for name, _ in q.named_buffers()} == {
        name for name in q.state_dict() if "quantizers." in name
    }
    for inputs in (x, x - 9, x + 9):
        y = model.fc(inputs)
        assert torch.equal(copy.deepcopy(q)(inputs), y + 1 if y.sum() > 0 else y - 1)


def test_paths_are_those_of_the_networks_own_modules():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    graph = hs.prepare(
        network, torch.randn(2, 1, 8, 8)
    ).graph  # whose batch's size is a node without a module
    paths = {path for node in graph.nodes for path, _ in node.meta.get("nn_module_stack", {}).values()}
    assert paths == {"", "0", "1", "2"}


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 4, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.rnn(packed)[1]


def test_packed_sequences_are_refused_with_what_to_do_instead():
    with pytest.raises(CaptureError, match=r"packed sequences .* lengths - 1\]"):
        capture(Packed(), (torch.randn(3, 5, 8), torch.tensor([5, 2, 3])))


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_names_that_torch_would_write_into_its_code_are_refused(name):
    with pytest.raises(CaptureError, match="rename it"):
        capture(nn.ModuleDict({name: nn.Linear(3, 2)}), torch.randn(2, 3))
