"""What a run is about: found again by content, refused where it is another."""

import functools

import numpy as np
import pytest
import torch
from climbing import climb, data, network

import halfstep as hs
from halfstep.errors import RunError
from halfstep.graph.capture import capture
from halfstep.ladder.identity import Examples, environment


def examples(*batches):
    found = Examples()
    for batch in batches:
        found.add(*batch)
    return found


def test_data_go_by_their_content_in_any_batches():
    x, y = torch.randn(12, 3), torch.arange(12)
    whole = examples((x, y))
    parts = examples((x[:6], y[:6]), (x[6:], y[6:]))
    turned = examples((x[6:], y[6:]), (x[:6], y[:6]))
    assert parts.digest() == whole.digest() != turned.digest()
    assert turned.contents() == whole.contents()
    assert examples((x, y.flip(0))).contents() != whole.contents()
    assert examples((x + torch.eye(12, 3) * 1e-6, y)).contents() != whole.contents()


IMAGES = torch.rand(2, 3, 64, 64)
DAMAGED = IMAGES.clone()
DAMAGED[:, :, 1:] = 0
MASK = torch.zeros(2, 512, 512, dtype=torch.long)
OTHER_MASK = MASK.clone()
OTHER_MASK[:, :, 1:64] = 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((IMAGES, None), (DAMAGED, None)),
        ((IMAGES, [0, 1]), (IMAGES, [1, 2])),
        ((IMAGES, np.array([0, 1])), (IMAGES, np.array([1, 2]))),
        ((IMAGES, ["a", "b"]), (IMAGES, ["c", "d"])),
        ((IMAGES, torch.zeros(5, 6)), (IMAGES, torch.ones(5, 6))),
        ((IMAGES, MASK), (IMAGES, OTHER_MASK)),
        (({"x": IMAGES, "flag": True}, None), ({"x": IMAGES, "flag": False}, None)),
    ],
)
def test_every_part_of_an_example_counts(one, other):
    assert examples(one).digest() == examples(one).digest() != examples(other).digest()


class Shifted(torch.nn.Module):
    """Has a tensor that no state dict holds."""

    def __init__(self, shift):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.shift = torch.nn.Linear(4, 3), torch.tensor(shift)

    def forward(self, x):
        return self.layer(x - self.shift)


def test_a_model_goes_by_its_content():
    digests = [capture(network(seed), data()[0][:4]).content for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    digests = [capture(Shifted(shift), torch.randn(2, 4)).content for shift in (0.0, 0.0, 5.0)]
    assert digests[0] == digests[1] != digests[2]


def topk(outputs, labels, k):
    return (outputs.topk(k).indices == labels[:, None]).any(1).float()


def labelled(seed=None):
    """The climb's labelled data, in an order by ``seed``."""
    inputs, labels = data()
    order = torch.arange(128)
    if seed is not None:
        order = torch.randperm(128, generator=torch.Generator().manual_seed(seed))
    return [(inputs[part], labels[part]) for part in order.split(64)]


def ptq(folder, metric, **options):
    return climb(folder, metric=metric, rungs=("ptq",), training=None, **options)


def test_a_partial_with_another_argument_is_another_metric(tmp_path):
    first = ptq(tmp_path, hs.Metric(labelled(), functools.partial(topk, k=1)))
    with pytest.raises(RunError, match="belongs to a run with another metric"):
        ptq(tmp_path, hs.Metric(labelled(), functools.partial(topk, k=2)))
    again = ptq(tmp_path, hs.Metric(labelled(), functools.partial(topk, k=2)), fresh=True)
    assert (first.float_score, again.float_score) == (1.0, 1.0)
    assert again.deployed_score >= first.deployed_score
    assert (tmp_path / "earlier-1" / "journal.jsonl").exists()


@pytest.mark.parametrize("kind", [list, np.array])
def test_other_labels_of_any_type_are_refused(tmp_path, kind):
    def told(turn):
        return hs.Accuracy([(x, kind(((y + turn) % 4).tolist())) for x, y in labelled()])

    ptq(tmp_path, told(0))
    with pytest.raises(RunError, match="belongs to a run with another labelled data"):
        ptq(tmp_path, told(1))


def test_a_function_over_other_data_is_refused(tmp_path):
    def over(turn):
        inputs, labels = data()

        def accuracy(model):
            return float((model(inputs).argmax(1) == (labels + turn) % 4).float().mean())

        return accuracy

    ptq(tmp_path, over(0))
    with pytest.raises(RunError, match=r"belongs to a run with another metric;.* __getstate__ returns$"):
        ptq(tmp_path, over(1))


def test_what_a_function_reads_is_seen_by_scoring_again(tmp_path):
    labels_file = tmp_path / "labels.pt"
    torch.save(data()[1], labels_file)

    def accuracy(model):
        return float((model(data()[0]).argmax(1) == torch.load(labels_file)).float().mean())

    first = ptq(tmp_path / "run", accuracy)
    said = [sentence for sentence in first.decisions if "What cannot be compared" in sentence]
    assert "the metric, a function that reads what it wants" in said[0]
    assert ptq(tmp_path / "run", accuracy).deployed_score == first.deployed_score
    torch.save(data()[1].roll(1), labels_file)
    with pytest.raises(
        RunError, match=r"another metric: the float model scores 0\.\d+ now, and 1 when the run began"
    ):
        ptq(tmp_path / "run", accuracy)


def hit(outputs, labels):
    return (outputs.argmax(1) == labels).float()


class Streamed(list):
    """Batches that an open file could change."""

    def __init__(self, batches, file):
        super().__init__(batches)
        self.file = file


def test_what_cannot_be_compared_is_said_at_the_start(tmp_path):
    with (tmp_path / "text").open("w") as file:
        metric = hs.Metric(
            [(x, (y, file)) for x, y in labelled()], lambda outputs, labels: hit(outputs, labels[0])
        )
        training = hs.Training(Streamed([data(5)], file), loss_on(1.0), epochs=1)
        first = climb(tmp_path / "run", metric=metric, rungs=("ptq", "qat"), training=training)
    said = [sentence for sentence in first.decisions if "cannot be compared" in sentence]
    assert len(said) == 2
    assert (
        "labelled data [0] (a TextIOWrapper, which can be iterated only once). The float model is scored"
        in said[0]
    )
    assert (
        "of the training: Streamed['file'] (a TextIOWrapper, which" in said[1]
        and "fresh=True (--fresh)" in said[1]
    )


THRESHOLD = 0.0


def margin(outputs, labels):
    return outputs.softmax(1).gather(1, labels[:, None])[:, 0] - THRESHOLD


@pytest.mark.slow
def test_global_variables_that_changed_are_seen_by_scoring_again(tmp_path, monkeypatch):
    first = ptq(tmp_path, hs.Metric(labelled(), margin))
    monkeypatch.setattr("test_run_identity.UNUSED", 1, raising=False)
    assert ptq(tmp_path, hs.Metric(labelled(), margin)).deployed_score == first.deployed_score
    monkeypatch.setitem(margin.__globals__, "THRESHOLD", 0.25)
    with pytest.raises(RunError, match="belongs to a run with another metric: the float model scores"):
        ptq(tmp_path, hs.Metric(labelled(), margin))


def test_the_same_examples_in_another_order_are_refused(tmp_path):
    ptq(tmp_path, hs.Accuracy(labelled(1)))
    with pytest.raises(RunError, match=r"the same labelled examples in another order.*shuffle=False"):
        ptq(tmp_path, hs.Accuracy(labelled(2)))


def test_another_order_is_no_matter_where_nothing_was_paired(tmp_path):
    class Unordered(list):
        """In another order at each pass."""

        def __iter__(self):
            x, y = (torch.cat(parts) for parts in zip(*list.__iter__(self), strict=True))
            order = torch.randperm(len(x))
            return iter([(x[order], y[order])])

    scores = set()
    for _ in range(2):
        metric = hs.Metric(Unordered(labelled()), margin)
        with pytest.warns(UserWarning, match="differ between two evaluations of the float model"):
            scores.add(ptq(tmp_path, metric, max_drop=1.0).deployed_score)
    assert len(scores) == 1


def test_another_confidence_is_another_configuration(tmp_path):
    ptq(tmp_path, hs.Accuracy(labelled()), confidence=0.6)
    changed = r"another configuration \(.* confidence 0.6, now .* confidence 0.99\)"
    with pytest.raises(RunError, match=changed):
        ptq(tmp_path, hs.Accuracy(labelled()), confidence=0.99)


def loss_on(scale):
    def loss(outputs, labels):
        return scale * torch.nn.functional.cross_entropy(outputs, labels)

    return loss


@pytest.mark.parametrize(
    "training",
    [
        {"loss": loss_on(2.0)},
        {"labelled": [(data(5)[0], data(5)[1].flip(0))]},
        {"labelled": [(x, y) for x, y in zip(*(part.split(64) for part in data(5)), strict=True)]},
        {"epochs": 2},
    ],
)
def test_another_training_is_refused(tmp_path, training):
    def trained(**changes):
        options = {"labelled": [data(5)], "loss": loss_on(1.0), "epochs": 1, **changes}
        return climb(tmp_path, rungs=("ptq", "qat"), training=hs.Training(**options))

    trained()
    with pytest.raises(RunError, match="belongs to a run with another training"):
        trained(**training)


@pytest.mark.filterwarnings("ignore:site .* on one half of the calibration data")
def test_a_shuffled_calibration_loader_goes_on(tmp_path):
    inputs, _ = data(2)

    def loader():
        return torch.utils.data.DataLoader(inputs, batch_size=16, shuffle=True)

    first = ptq(tmp_path, hs.Accuracy(labelled()), calibration=loader())
    again = ptq(tmp_path, hs.Accuracy(labelled()), calibration=loader())
    assert again.deployed_score == first.deployed_score
    assert not any("come otherwise than before" in sentence for sentence in again.decisions)
    part = ptq(tmp_path, hs.Accuracy(labelled()), calibration=iter([inputs[:16], data(3)[0]]))
    said = [
        sentence
        for sentence in part.decisions
        if "come otherwise than before (16 of 128 examples" in sentence
    ]
    assert len(said) == 1 and part.deployed_score == first.deployed_score


def test_a_directory_of_an_earlier_halfstep_is_refused(tmp_path):
    from halfstep.journal import Journal

    with Journal(tmp_path) as journal:
        journal.claim("model", "abc")
    with pytest.raises(RunError, match=r"was written by an earlier halfstep.*fresh=True"):
        ptq(tmp_path, hs.Accuracy(labelled()))


def test_what_was_measured_elsewhere_is_measured_again_and_another_halfstep_is_refused(tmp_path, monkeypatch):
    made = []

    class Watched(hs.Accuracy):
        """Notes what it scores."""

        def __getstate__(self):
            return {}

        def evaluate(self, model):
            made.append(type(model).__name__)
            return super().evaluate(model)

    def elsewhere(name):
        there = {**environment(), name: "another"}
        monkeypatch.setattr("halfstep.ladder.identity.environment", lambda: there)

    first = ptq(tmp_path, Watched(labelled()))
    assert made.count("DeployedModel") == 1
    made.clear()
    ptq(tmp_path, Watched(labelled()))
    assert made == []
    for name in ("onnxruntime", "processor"):
        elsewhere(name)
        assert ptq(tmp_path, Watched(labelled())).deployed_score == first.deployed_score
        assert made == ["DeployedModel"]
        made.clear()
    elsewhere("halfstep")
    with pytest.raises(RunError, match=r"another version of halfstep \(.*, now another\)"):
        ptq(tmp_path, Watched(labelled()))
