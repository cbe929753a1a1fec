"""Several modules quantized together, judged by what they do one after another."""

import json

import pytest
import torch
from networks import INPUTS, Attention
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError, DataError, ExportError, MetricError
from halfstep.fidelity.reference import knowing_float
from halfstep.graph.pipeline import joined_batches
from halfstep.runtime.file import module_file

STEPS = 3


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.outer(self.inner(x).relu())


class Decoder(nn.Module):
    """A step: the state goes round, the last output is read again."""

    def __init__(self, size=1.0):
        super().__init__()
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 8)
        self.size = size

    def forward(self, last, memory):
        state = self.mix(torch.cat([last, memory], 1)).relu()
        return {"logits": self.head(state) * self.size, "state": state * self.size}


def networks(size=1.0):
    torch.manual_seed(0)
    return {"encoder": Encoder().eval(), "decoder": Decoder(size).eval()}


DATA = seeded(96, 6)


def decoded(models):
    """The decoder's answers, round after round."""
    with torch.no_grad():
        memory = models["encoder"](DATA)
        last, found = torch.zeros_like(memory), []
        for _ in range(STEPS):
            last = models["decoder"](last=last, memory=memory)["logits"]
            found.append(last)
    return torch.stack(found)


WANTED = decoded(networks()).argmax(-1)


def agreement(models):
    return float((decoded(models).argmax(-1) == WANTED).double().mean())


class Counted:
    """The same; what was called is no part of it."""

    def __init__(self):
        self.calls = []

    def __getstate__(self):
        return {}

    def __call__(self, models):
        self.calls.append(type(models))
        return agreement(models)


EXAMPLE = {"encoder": DATA[:4], "decoder": {"last": seeded(4, 8), "memory": seeded(4, 8, seed=1)}}


def calibration():
    """The decoder's own inputs, of another number and in batches of another size than the encoder's."""
    with torch.no_grad():
        models, inputs = networks(), seeded(64, 6, seed=5)
        memory, steps = models["encoder"](inputs), []
        last = torch.zeros_like(memory)
        for _ in range(STEPS):
            steps.append({"last": last, "memory": memory})
            last = models["decoder"](last, memory)["logits"]
    return {"encoder": list(inputs.split(24)), "decoder": steps}


def climb(folder=None, metric=None, **options):
    torch.set_num_threads(1)
    settings = {"max_drop": 0.05, "threads": 1, "rungs": ("ptq", "partial"), "directory": folder}
    return hs.quantize(networks(), EXAMPLE, calibration(), metric or Counted(), **settings | options)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return climb(tmp_path_factory.mktemp("pipeline") / "run")


@pytest.fixture(scope="module")
def calibrated():
    model = hs.prepare(networks(), EXAMPLE)
    hs.observe(model, calibration())
    hs.calibrate(model)
    return model


def test_one_ladder_and_one_outcome_for_all(outcome):
    assert outcome.met and outcome.rung == "ptq" and outcome.float_score == 1
    assert {layer.name for layer in outcome.verification.layers} == {
        "encoder.inner",
        "encoder.outer",
        "decoder.mix",
        "decoder.head",
    }
    assert outcome.verification.integer_layers == 4


def test_each_module_has_a_file_and_these_are_what_was_scored(outcome):
    import onnxruntime

    def run(name):
        session = onnxruntime.InferenceSession(module_file(outcome.directory / "model.onnx", name))
        names = [value.name for value in session.get_inputs()]

        def call(*args, **kwargs):
            tensors = [*args, *(kwargs[key] for key in ("last", "memory") if key in kwargs)]
            given = zip(names, (tensor.numpy() for tensor in tensors), strict=True)
            found = [torch.from_numpy(array) for array in session.run(None, dict(given))]
            return found[0] if name == "encoder" else dict(zip(("logits", "state"), found, strict=True))

        return call, names

    encoder, names = run("encoder")
    assert names == ["encoder"]
    decoder, names = run("decoder")
    assert names == ["decoder_last", "decoder_memory"]
    assert agreement({"encoder": encoder, "decoder": decoder}) == outcome.deployed_score


def test_the_same_call_again_repeats_nothing(outcome):
    metric = Counted()
    again = climb(outcome.directory, metric)
    # Of what a function reads nothing is known: the float model is scored once more.
    assert metric.calls == [dict]
    assert again.deployed_score == outcome.deployed_score and again.evaluations == outcome.evaluations
    assert json.loads((outcome.directory / "outcome.json").read_text())["met"]


def test_exporting_an_outcome_writes_a_file_each(outcome, tmp_path):
    path = outcome.export(tmp_path / "whole.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {
        "whole.onnx",
        "whole.encoder.onnx",
        "whole.decoder.onnx",
    }
    assert path.stat().st_size > module_file(path, "encoder").stat().st_size


def test_layers_of_any_module_go_back_to_float():
    outcome = climb(recipe=hs.Recipe.uniform(2, 8, hs.PerTensor(), ends=None), max_drop=0.02)
    assert outcome.rung == "partial" and outcome.float_layers
    assert all(name.startswith(("encoder.", "decoder.")) for name in outcome.float_layers)


@pytest.mark.parametrize("mode", ["float", "quantized"])
def test_a_module_alone_answers_as_it_does_beside_the_others(calibrated, mode):
    from halfstep.fake_quantize import Mode

    with calibrated.using(Mode.FLOAT if mode == "float" else Mode.QUANTIZE), torch.no_grad():
        alone = calibrated.modules_alone()
        whole = calibrated(**EXAMPLE)
        torch.testing.assert_close(alone["encoder"](EXAMPLE["encoder"]), whole["encoder"])
        found = alone["decoder"](**EXAMPLE["decoder"])
        assert list(found) == ["logits", "state"]
        torch.testing.assert_close(found, whole["decoder"])
        assert alone["encoder"](DATA[:1]).shape == (1, 8)


def test_a_module_alone_refuses_what_it_was_not_captured_with(calibrated):
    alone = calibrated.modules_alone()
    with pytest.raises(
        DataError, match=r"module 'decoder': got 2 positional arguments and keywords \[\], needed 0"
    ):
        alone["decoder"](seeded(2, 8), seeded(2, 8))
    with pytest.raises(DataError, match=r"input 'encoder': got shape \(2, 7\), needed \(batch, 6\)"):
        alone["encoder"](seeded(2, 7))


def test_a_model_that_is_no_dict_has_no_modules_alone():
    assert hs.prepare(Encoder(), DATA[:2]).modules_alone() == {}


def rows(batches):
    return {tuple(row) for batch in batches for row in batch.tolist()}


@pytest.mark.parametrize("as_iterators", [False, True])
def test_every_example_of_every_module_is_seen(calibrated, as_iterators):
    data = calibration()
    encoder, decoder = data["encoder"], [step["last"] for step in data["decoder"]]
    if as_iterators:
        data = {name: iter(batches) for name, batches in data.items()}
    captured = calibrated.captured
    joined = list(joined_batches(captured.parts, captured.batch_axes, data))
    assert all(len(batch["encoder"]) == len(batch["decoder"]["memory"]) for batch in joined)
    assert rows(batch["encoder"] for batch in joined) == rows(encoder)
    assert rows(batch["decoder"]["last"] for batch in joined) == rows(decoder)
    assert sum(len(batch["encoder"]) for batch in joined) == 64 * STEPS  # no more than the longest has


def test_no_module_drowns_the_others():
    """The outputs of one are a thousand times larger: what its layers lose counts as before."""

    def losses(size):
        model = hs.prepare(networks(size), EXAMPLE)
        hs.observe(model, calibration())
        hs.calibrate(model)
        return {
            method: {row.layers: row.score for row in hs.sensitivity(model, method=method).rows}
            for method in ("sqnr", "fisher_sqnr")
        }

    small, large = losses(1.0), losses(1000.0)
    for method, found in small.items():
        assert min(found.values()) > 0
        assert large[method] == pytest.approx(found, rel=0.05)


def test_labelled_inputs_of_all_give_scores_by_example():
    """Two towers: how near the vectors of pairs are."""
    torch.manual_seed(1)
    towers = {"image": Encoder().eval(), "text": Encoder().eval()}
    pairs = {"image": DATA, "text": seeded(96, 6, seed=3)}
    metric = hs.Metric(
        [(pairs, None)], lambda outputs, _: torch.cosine_similarity(outputs["image"], outputs["text"])
    )
    outcome = hs.quantize(
        towers,
        {name: x[:4] for name, x in pairs.items()},
        {"image": [seeded(48, 6, seed=7)], "text": [seeded(48, 6, seed=8)]},
        {"pairs": metric, "as float": hs.Cosine([pairs])},
        max_drop=0.05,
        threads=1,
    )
    assert outcome.met and all(standing.low is not None for standing in outcome.metrics)


def test_half_precision_is_compared_as_it_was_handed_over():
    half = {name: module.to(torch.bfloat16) for name, module in networks().items()}
    with pytest.warns(UserWarning, match=r"computed in torch\.float32"):
        model = hs.prepare(half, EXAMPLE)
    alone = model.handed_over.modules_alone()
    assert alone["encoder"](DATA[:2]).dtype == torch.bfloat16
    assert alone["decoder"](**EXAMPLE["decoder"])["logits"].dtype == torch.bfloat16


def test_what_varies_is_named_by_module_and_input():
    model = hs.prepare(
        {"encoder": Encoder(), "decoder": Encoder()},
        {"encoder": seeded(2, 5, 6), "decoder": (seeded(2, 4, 6),)},
        dynamic={"encoder": {1: "source"}, "decoder_0": {1: "target"}},
    )
    hs.observe(model, {"encoder": [seeded(4, 9, 6), seeded(4, 2, 6)], "decoder": [seeded(4, 3, 6)]})
    assert model.modules_alone()["decoder"](seeded(1, 7, 6)).shape == (1, 7, 8)


def test_modules_may_be_shown_the_same_tensor():
    """Their sizes are not the same size for that."""
    model = hs.prepare(
        {"left": Attention(), "right": Attention()}, dict.fromkeys(("left", "right"), INPUTS[:4])
    )
    alone = model.modules_alone()
    assert alone["right"](INPUTS[:3]).shape == alone["left"](INPUTS[:3]).shape == (3, 3)


def test_a_function_is_handed_the_modules_once(calibrated):
    metric = knowing_float(hs.CallableMetric(agreement), calibrated)
    assert knowing_float(metric, calibrated) is metric
    assert metric.evaluate(calibrated).value > 0.8


@pytest.mark.parametrize(
    ("models", "example", "data", "message"),
    [
        ({}, EXAMPLE, calibration(), "model: got an empty dict"),
        (
            {"encoder": "model.onnx"},
            EXAMPLE,
            calibration(),
            "model 'encoder': got str, needed a torch.nn.Module",
        ),
        ({"train": Encoder()}, EXAMPLE, calibration(), "model: got a module called 'train'"),
        ({"a.b": Encoder()}, EXAMPLE, calibration(), "model: got a module called 'a.b'"),
        (networks(), EXAMPLE["encoder"], calibration(), "example_inputs: got Tensor, needed a dict"),
        (
            networks(),
            {"encoder": DATA[:4]},
            calibration(),
            "example_inputs: got nothing for module 'decoder'",
        ),
        (
            networks(),
            {**EXAMPLE, "encoder": DATA[:3]},
            calibration(),
            "got batches of 3 for 'encoder', 4 for 'decoder'",
        ),
        (
            networks(),
            EXAMPLE,
            {**calibration(), "head": []},
            "calibration: got something for the unknown module 'head'",
        ),
        (networks(), EXAMPLE, {**calibration(), "encoder": []}, "calibration 'encoder': got no batch"),
        (
            networks(),
            EXAMPLE,
            {**calibration(), "decoder": [DATA]},
            "calibration 'decoder': module 'decoder': got 1 pos",
        ),
        (Encoder(), DATA[:4], {"x": DATA}, "calibration: got a dict, needed an iterable of batches"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(models, example, data, message):
    with pytest.raises((ArgumentError, DataError), match=message.replace("(", r"\(")):
        hs.quantize(models, example, data, agreement if isinstance(models, dict) else lambda model: 1.0)


def test_an_accuracy_of_several_modules_is_refused(calibrated):
    labelled = [(EXAMPLE, torch.zeros(4, dtype=torch.long))]
    with pytest.raises(MetricError, match=r"got hs\.Accuracy for several modules, needed hs\.Metric"):
        hs.sensitivity(calibrated, metric=hs.Accuracy(labelled))


def test_a_metric_that_fails_on_the_modules_says_so():
    with pytest.raises(MetricError, match="the function raised KeyError: 'head'"):
        climb(metric=lambda models: models["head"])


def test_a_file_of_all_without_those_of_its_modules_is_refused(calibrated, tmp_path):
    from halfstep.runtime.deployed import DeployedModel

    path = hs.export_onnx(calibrated, tmp_path / "model.onnx")
    module_file(path, "decoder").unlink()
    with pytest.raises(ExportError, match=r"model\.decoder\.onnx"):
        DeployedModel(path).modules_alone(calibrated.captured.parts)
