"""Climbs of models in half precision or float64: held to the user's own scores, proven as files in float32."""

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import RunError
from halfstep.runtime.deployed import DeployedModel
from tests.ladder.climbing import climb, data, network

TYPES = [torch.float16, torch.bfloat16, torch.float64]
INPUTS, LABELS = data()
#: Weights whose products no processor's kernels saturate.
RECIPE = hs.Recipe.uniform(7, 8)


def half_data(dtype):
    return [(INPUTS[:64].to(dtype), LABELS[:64]), (INPUTS[64:].to(dtype), LABELS[64:])]


def accuracy(model, dtype):
    with torch.no_grad():
        return float((model(INPUTS.to(dtype)).argmax(1) == LABELS).double().mean())


def half_climb(folder, dtype, given=None, judged=None, model=None, **options):
    calibration, _ = data(2)
    with pytest.warns(UserWarning, match="handed over in") as heard:
        outcome = hs.quantize(
            model or network().to(dtype),
            INPUTS[:4].to(given or dtype),
            list(calibration.to(given or dtype).split(32)),
            hs.Accuracy(half_data(judged or dtype)),
            directory=folder,
            threads=1,
            **{"max_drop": 0.2, "rungs": ("ptq",), "recipe": RECIPE, **options},
        )
    said = [str(each.message) for each in heard if "handed over" in str(each.message)]
    assert len(said) == 1 and outcome.decisions.count(said[0]) == 1
    return outcome


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("given", "judged"), [(None, torch.float32), (torch.float32, None)])
def test_the_drop_is_measured_from_the_model_as_it_was_handed_over(dtype, given, judged):
    """Calibration and labelled data may each be in the model's type or in float32."""
    model = network().to(dtype)
    before = copy.deepcopy(model).state_dict()
    outcome = half_climb(None, dtype, given, judged, model)
    assert outcome.float_score == accuracy(model, dtype)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert outcome.met and outcome.verification.parity.top1 > 0.95
    assert not any("unlike" in sentence for sentence in outcome.decisions)
    state = outcome.model.to_float_state_dict()
    assert {x.dtype for x in state.values()} == {dtype}


def test_a_score_that_half_precision_costs_is_the_users():
    """Logits whose differences bfloat16 cannot tell: the first class wins ties, float32 would tell them apart."""
    model = nn.Sequential(nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[0].bias.fill_(1.0)
    model.bfloat16()
    labels = copy.deepcopy(model).float()(INPUTS).argmax(1)
    metric = hs.Accuracy([(INPUTS, labels)])
    with pytest.warns(UserWarning, match="handed over in"):
        q = hs.prepare(model, INPUTS[:4])
    hs.observe(q, [INPUTS])
    hs.calibrate(q)
    with torch.no_grad():
        own = float((model(INPUTS.bfloat16()).argmax(1) == labels).double().mean())
    assert own < 0.7
    result = hs.partial(q, metric, 0.2)
    assert result.met and result.float_score == own


def test_a_run_goes_on_with_the_same_precision_only(tmp_path):
    first = half_climb(tmp_path, torch.bfloat16)
    again = half_climb(tmp_path, torch.bfloat16)
    assert again.deployed_score == first.deployed_score and again.evaluations == first.evaluations
    assert [made.key for made in again.history] == [made.key for made in first.history]
    with pytest.raises(RunError, match="belongs to a run with another model"):
        climb(tmp_path, recipe=RECIPE, max_drop=0.2, rungs=("ptq",))


def test_every_rung_takes_it(tmp_path):
    training = hs.Training([(INPUTS.bfloat16(), LABELS)], nn.functional.cross_entropy, epochs=2, control=True)
    outcome = half_climb(
        tmp_path,
        torch.bfloat16,
        rungs=("ptq", "partial", "qat"),
        recipe=hs.Recipe.uniform(3, 3),
        training=training,
        partial=hs.Partial(order="latency"),
        max_drop=0.0,
        max_float=0.0,
    )
    assert [reached.rung for reached in outcome.path] == ["ptq", "partial", "qat"]
    assert {x.dtype for x in outcome.model.to_float_state_dict().values()} == {torch.bfloat16}


def test_files_take_and_return_float32_and_the_module_of_one_takes_either(tmp_path):
    outcome = half_climb(tmp_path, torch.bfloat16)
    for name in ("model.onnx", "float.onnx"):
        graph = onnx.load(tmp_path / name).graph
        for value in (*graph.input, *graph.output):
            assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    deployed = DeployedModel(tmp_path / "model.onnx", threads=1)
    assert deployed.session.types == [np.dtype("float32")]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        answer = deployed(INPUTS.bfloat16().to(dtype))
        assert answer.dtype is torch.float32 and torch.equal(answer, deployed(INPUTS.bfloat16().float()))
    again = hs.Accuracy(half_data(torch.bfloat16)).evaluate(deployed)
    assert again.value == outcome.deployed_score


def test_any_function_is_called_with_the_users_model(tmp_path):
    seen = []

    def metric(model):
        outputs = model(INPUTS.bfloat16())
        seen.append((type(model).__name__, outputs.dtype))
        return float((outputs.argmax(1) == LABELS).double().mean())

    with pytest.warns(UserWarning, match="handed over in"):
        hs.quantize(
            network().bfloat16(),
            INPUTS[:4].bfloat16(),
            [data(2)[0].bfloat16()],
            metric,
            0.2,
            RECIPE,
            rungs=("ptq",),
        )
    assert seen[:2] == [("HandedOver", torch.bfloat16)] * 2
    assert set(seen[2:]) == {("QuantizedModel", torch.float32), ("DeployedModel", torch.float32)}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        attn_implementation="eager",
    )
    ids = torch.randint(0, 50, (192, 8))
    return BertForSequenceClassification(config), {
        "input_ids": ids,
        "attention_mask": (torch.arange(8) < torch.randint(4, 9, (192, 1))).long(),
    }


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return ViTForImageClassification(config), {"pixel_values": torch.randn(192, 3, 8, 8)}


@pytest.mark.parametrize("make", [bert, vit])
def test_a_transformer_as_it_is_loaded_by_default(make):
    model, inputs = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # or one class would win everywhere
    model.bfloat16().eval()
    given = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        labels = model(**given).logits.argmax(1)
    batches = [{name: x[i : i + 48] for name, x in given.items()} for i in range(0, 192, 48)]
    with pytest.warns(UserWarning, match="handed over in torch.bfloat16"):
        outcome = hs.quantize(
            model,
            {name: x[:2] for name, x in inputs.items()},  # pixels in float32
            batches[2:],
            hs.Accuracy(list(zip(batches[:2], labels.split(48)[:2], strict=True))),
            max_drop=0.2,
            recipe=RECIPE,
            threads=1,
        )
    assert outcome.met and outcome.float_score == 1.0
    assert outcome.verification.integer_layers > 0
    state = outcome.model.to_float_state_dict()
    assert {name: x.dtype for name, x in state.items()} == {
        name: x.dtype for name, x in model.state_dict().items()
    }


def test_sensitivity_measures_from_the_users_model():
    with pytest.warns(UserWarning, match="handed over in"):
        q = hs.prepare(network().bfloat16(), INPUTS[:4].bfloat16())
    hs.observe(q, [INPUTS.bfloat16()])
    hs.calibrate(q)
    table = hs.sensitivity(q, method="metric", metric=hs.Accuracy(half_data(torch.float32)))
    assert len(table.rows) == 3
