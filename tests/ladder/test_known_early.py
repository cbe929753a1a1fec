"""What can be known before the first long pass is said before it."""

import copy

import onnx_ir as ir
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError, DataError, ExportError, RecipeError, TrainingError
from halfstep.export import build
from halfstep.training.check import check_trainable
from tests.ladder.climbing import data, network

X, LABELS = data(5)
CROSS_ENTROPY = nn.functional.cross_entropy


class Touched(Exception):
    """The long passes have begun."""


class Untouchable(hs.Accuracy):
    def stream(self, *arguments, **options):
        raise Touched


def attempt(model=None, **options):
    """The climb of a model, which ends where it would begin to evaluate or calibrate."""

    def calibration():
        raise Touched
        yield

    examples, labels = data()
    return hs.quantize(
        model or network(),
        options.pop("example_inputs", examples[:4]),
        calibration(),
        Untouchable([(examples, labels)]),
        **{"recipe": hs.Recipe.uniform(3, 3), "threads": 1, **options},
    )


def training(labelled=((X, LABELS),), loss=CROSS_ENTROPY, **options):
    return hs.Training(list(labelled), loss, **options)


def test_what_is_in_order_gets_to_the_long_passes():
    with pytest.raises(Touched):
        attempt(training=training())


class Bessel(nn.Sequential):
    def forward(self, x):
        return torch.special.bessel_j0(super().forward(x))


MODELS = {
    "an operator that ONNX has not": (
        lambda: Bessel(*network()),
        ExportError,
        r"ONNX has no operator for \w+.bessel_j0 \(at 'special_bessel_j0'\); compute it from other operators",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_deployed(name):
    make, error, message = MODELS[name]
    with pytest.raises(error, match=message):
        attempt(make())


def test_a_file_that_answers_otherwise_is_refused(monkeypatch):
    honest = build.build_float

    def larger(model):
        file = honest(model)
        for value in file.graph.initializers.values():
            if value.dtype == ir.DataType.FLOAT:
                value.const_value = ir.tensor(1.1 * value.const_value.numpy())
        return file

    monkeypatch.setattr(build, "build_float", larger)
    with pytest.raises(
        ExportError,
        match=r"the float network's file, on onnxruntime, answers otherwise than the network: .* dB, needed",
    ):
        attempt()


def test_example_inputs_of_nan_are_told():
    with pytest.raises(
        DataError, match=r"example_inputs: 6 of 24 values are NaN; give inputs as the network will"
    ):
        attempt(example_inputs=torch.cat([X[:3], torch.full((1, 6), torch.nan)]))


class Beside(nn.Sequential):
    """The input, and the class beside it."""

    def forward(self, x):
        return x * 2.0, super().forward(x).argmax(1)


TRAININGS = {
    "loss that raises": (
        {"training": training(loss=lambda outputs, labels: CROSS_ENTROPY(outputs, labels.float()))},
        TrainingError,
        r"training batch 0: loss\(outputs, labels\) raised RuntimeError",
    ),
    "loss without gradient": (
        {"training": training(loss=lambda outputs, labels: outputs.detach().sum())},
        TrainingError,
        r"training batch 0: loss\(outputs, labels\) does not depend on the outputs",
    ),
    "loss of NaN": (
        {"training": training(loss=lambda outputs, labels: outputs.sum() * torch.nan)},
        TrainingError,
        r"training batch 0: the loss of the float network is nan, needed a finite number",
    ),
    "no batch": ({"training": training([])}, DataError, r"training data: got no batch, needed at least one"),
    "no pair": ({"training": training([X])}, DataError, r"training batch 0: got Tensor, needed a pair"),
    "no labels": ({"training": training([(X, None)])}, DataError, r"training batch 0: its labels are None"),
    "wrong shape": (
        {"training": training([(X[:, :5], LABELS)])},
        DataError,
        r"training batch 0: input 'input': got shape \(128, 5\), needed \(batch, 6\)",
    ),
    "wrong type": (
        {"training": training([(X.double(), LABELS)])},
        DataError,
        r"training batch 0: input 'input': got torch.float64, needed torch.float32 .*convert it with "
        r"\.to\(torch\.float32\)",
    ),
    "distillation of one class": (
        {
            "model": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)),
            "training": training([(X, None)], None, distillation=hs.Distillation(axis=1)),
        },
        TrainingError,
        r"training batch 0: Distillation: axis 1 of the output \(batch, 1\) has one entry, whose softmax is always 1",
    ),
    "distillation of what does not train": (
        {
            "model": Beside(nn.Linear(6, 8)),
            "training": training([(X, None)], None, distillation=hs.Distillation(measure="mse")),
        },
        TrainingError,
        r"training batch 0: distillation has no gradient: no floating-point output of the model depends on what",
    ),
    "pins of no layer": (
        {"partial": hs.Partial(keep_float=("head",))},
        RecipeError,
        r"pattern 'head' matches no layer; the nearest names are",
    ),
    "rungs without ranges": (
        {"rungs": ["partial"]},
        ArgumentError,
        r"rungs: got 'partial', needed 'ptq' first: .* give rungs=\['ptq', 'partial'\]",
    ),
    "rungs the other way round": ({"rungs": ["qat", "ptq"]}, ArgumentError, r"give rungs=\['ptq', 'qat'\]"),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings_that_cannot_begin(name):
    options, error, message = TRAININGS[name]
    with pytest.raises(error, match=message):
        attempt(**options)


def test_a_method_of_no_such_name_is_refused_at_once():
    with pytest.raises(ArgumentError, match=r"method: got 'guess', needed one of 'metric', 'kl'"):
        hs.Partial(method="guess")


def test_a_frozen_model_is_told_unless_nothing_would_train_it():
    frozen = network().requires_grad_(False)
    with pytest.raises(TrainingError, match=r"no trainable parameter: every one has requires_grad=False"):
        attempt(frozen, training=training())
    with pytest.raises(Touched):
        attempt(frozen, training=training(), rungs=["ptq", "partial"])


def test_a_look_at_the_training_changes_nothing():
    examples = torch.utils.data.TensorDataset(X, LABELS)
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(examples, 32, shuffle=True, generator=generator)
    kept = hs.Training((batch for batch in [(X[:8], LABELS[:8]), (X[8:], LABELS[8:])]), CROSS_ENTROPY)
    q = hs.prepare(network(), X[:4])
    parameters = copy.deepcopy(dict(q.named_parameters()))
    random, seed = torch.get_rng_state(), generator.get_state()
    for one in (training(), kept, hs.Training(loader, lambda o, y: CROSS_ENTROPY(o, y) + torch.rand(()))):
        check_trainable(q, one)
    assert len(list(kept.labelled)) == 2
    assert torch.equal(generator.get_state(), seed)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in q.named_parameters())
    assert all(parameter.grad is None for parameter in q.parameters())


def test_evaluation_data_of_another_type_are_named():
    examples, labels = data()
    metric = hs.Accuracy([(examples, labels), (examples.double(), labels)])
    with pytest.raises(
        DataError, match=r"metric: batch 1: input 'input': got torch.float64, needed torch.float32"
    ):
        metric.evaluate(hs.prepare(network(), X[:4]))
