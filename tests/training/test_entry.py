"""Training through another way into the network: the same layers and quantizers, other outputs."""

import copy

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import TrainingError
from halfstep.fake_quantize import Mode
from halfstep.model import run
from halfstep.training.entry import entered


class Detector(nn.Module):
    """Boxes and scores of every cell of a map: raw in training, decoded in inference, with a layer in the decoding."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.boxes, self.scores = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 3, 1)
        self.expectation = nn.Conv2d(4, 1, 1, bias=False)
        self.expectation.weight.data = torch.arange(4.0).reshape(1, 4, 1, 1)
        self.expectation.requires_grad_(False)
        self.auxiliary = nn.Conv2d(8, 3, 1)
        self.register_buffer("levels", torch.arange(4.0))

    def features(self, x):
        return torch.relu(self.body(self.stem(x)))

    def heads(self, x):
        y = self.features(x)
        return {"boxes": self.boxes(y), "scores": self.scores(y)}

    def forward(self, x):
        raw = self.heads(x)
        distances = raw["boxes"].flatten(2).unflatten(1, (4, 4)).transpose(1, 2).softmax(1)
        sides = self.expectation(distances).squeeze(1)
        return torch.cat([64 * sides, raw["scores"].flatten(2).sigmoid()], 1)

    def with_auxiliary(self, x):
        return {**self.heads(x), "auxiliary": self.auxiliary(self.features(x))}

    def before_norm(self, x):
        return self.stem[0](x)


def scaled(model, x):
    """Raw heads of brighter images, their boxes in another unit: constants that the model has not."""
    raw = model.heads(x * torch.tensor([[[1.0]], [[2.0]]])[:1] + 0.25)
    return raw["boxes"] * torch.full((16, 1, 1), 3.0), raw["scores"]


def images(count=8, seed=1):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    net = Detector()
    for _ in range(5):
        net(images())  # statistics for the batch norm
    return net.eval()


@pytest.fixture(scope="module")
def prepared(detector):
    q = hs.prepare(detector, images(2), hs.Recipe.uniform(4, 4, ends=None))
    hs.observe(q, [images()])
    hs.calibrate(q)
    return q


def boxes_and_scores(outputs, labels):
    return outputs["boxes"].square().mean() + nn.functional.binary_cross_entropy_with_logits(
        outputs["scores"], labels
    )


WAYS = {"boxes": hs.Distillation(measure="mse"), "scores": hs.Distillation(axis=1, weight=2.0)}
LABELLED = [(images(), torch.ones(8, 3, 4, 4))] * 4


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_float_answers_are_those_of_the_method(detector, target):
    q = hs.prepare(detector, images(2), target=target)
    with torch.no_grad():
        torch.testing.assert_close(entered(q, "heads")(images(3)), detector.heads(images(3)))


def test_the_quantizers_are_the_models_own(prepared):
    seen = []
    hooks = [
        site.register_forward_pre_hook(lambda module, args: seen.append(module.name))
        for site in prepared.sites.values()
    ]
    try:
        with prepared.using(Mode.QUANTIZE), torch.no_grad():
            raw = entered(prepared, "heads")(images())
            inside = sorted(seen)
            seen.clear()
            answer = run(prepared, images())
    finally:
        for hook in hooks:
            hook.remove()
    assert set(inside) == set(seen)  # what decodes behind the heads is float, by rule
    assert {"stem.0.weight", "body.weight", "boxes.weight", "scores.weight", "x"} <= set(inside)
    # What the model answers with is made of the same quantized scores.
    torch.testing.assert_close(answer[:, 4:], raw["scores"].flatten(2).sigmoid())


def test_a_layer_that_reads_something_else_keeps_its_quantizer(detector, prepared):
    with torch.no_grad():
        with prepared.using(Mode.FLOAT):
            torch.testing.assert_close(entered(prepared, scaled)(images()), scaled(detector, images()))
        site = prepared.sites["x"]
        boxes, scores = entered(prepared, scaled)(images())
        wanted = entered(prepared, "heads")(site(images() + 0.25))
    torch.testing.assert_close(scores, wanted["scores"])
    torch.testing.assert_close(boxes, 3 * wanted["boxes"])


def test_what_is_trained_is_what_the_model_answers_with(prepared):
    q = copy.deepcopy(prepared)
    before = run(q, images())
    training = hs.Training(
        LABELLED,
        boxes_and_scores,
        forward="heads",
        distillation=None,
        learning_rate=1e-2,
        epochs=2,
    )
    trained = hs.train(q, training)
    assert trained.losses[-1] < trained.losses[0]
    assert not torch.equal(run(q, images()), before)
    changed = {n for n, p in q.named_parameters() if not torch.equal(p, prepared.get_parameter(n))}
    assert {"stem.0.weight", "body.weight", "boxes.weight", "scores.weight"} <= changed
    assert "expectation.weight" not in changed


def test_several_outputs_are_distilled_each_in_its_way(prepared, tmp_path):
    q = copy.deepcopy(prepared)
    training = hs.Training(LABELLED, forward="heads", outputs=WAYS, checkpoint_every=1)
    trained = hs.train(q, training, directory=tmp_path)
    assert trained.distilled == (
        "squared error, over the variance of the float model's, of output 'boxes' (batch, 16, 4, 4), as asked for; "
        "KL divergence of the softmax over axis 1 of output 'scores' (batch, 3, 4, 4), as asked for"
    )
    with torch.no_grad():
        teacher, now = (entered(prepared, "heads")(images()) for _ in range(2))
        both = [way.loss(now[name], teacher[name]) for name, way in WAYS.items()]
    assert all(float(each) == 0 for each in both)
    again = hs.train(copy.deepcopy(prepared), training, directory=tmp_path)
    assert again.distilled == trained.distilled
    assert again.losses == trained.losses


@pytest.mark.slow
def test_a_detector_climbs_to_the_last_rung(detector):
    def closeness(outputs, labels):
        return -(outputs - labels).abs().mean((1, 2))

    with torch.no_grad():
        answers = detector(images(16, seed=2))
    outcome = hs.quantize(
        detector,
        images(2),
        [images(32, seed=3)],
        hs.Metric([(images(16, seed=2), answers)], closeness),
        max_drop=1e-6,
        recipe=hs.Recipe.uniform(4, 4, ends=None),
        training=hs.Training(LABELLED, forward="heads", outputs=WAYS, learning_rate=1e-3),
        rungs=("ptq", "qat"),
        progress=False,
    )
    assert outcome.path[-1].rung == "qat"
    assert any("of output 'boxes'" in sentence for sentence in outcome.decisions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forward": "head"}, r"forward is 'head', needed a method of Detector \('features', 'heads', "),
        (
            {"forward": "with_auxiliary"},
            r"layer 'auxiliary' reads 'auxiliary\.\w+', which the model does not answer",
        ),
        (
            {"forward": "before_norm"},
            r"batch norm behind the layer of 'stem.0.weight' is folded into it on one way",
        ),
        ({"forward": lambda model: model}, r"forward: the function: example_inputs: got 1 positional inputs"),
        ({"forward": "heads", "outputs": ["box"]}, r"outputs has 'box', needed one of .*: 'boxes', 'scores'"),
    ],
)
def test_ways_that_cannot_be(prepared, changes, message):
    with pytest.raises(TrainingError, match=message):
        hs.train(prepared, hs.Training(LABELLED, boxes_and_scores, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forward": 3}, "forward is 3, needed the name of a method, or a function"),
        ({"outputs": "boxes"}, r"outputs is 'boxes', needed names of outputs such as \['scores', 'boxes'\]"),
        ({"outputs": []}, r"outputs is \[\], needed names"),
        ({"outputs": ["boxes"], "distillation": None}, r"needed hs.Distillation\(...\) for each name"),
    ],
)
def test_options_that_cannot_be(changes, message):
    with pytest.raises(TrainingError, match=message):
        hs.Training(LABELLED, boxes_and_scores, **changes)
