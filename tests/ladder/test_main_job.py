"""hs.quantize on digits, and bad input to it."""

import json

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.calibration import calibrate
from halfstep.demo import load_digits, train_digits
from halfstep.errors import ArgumentError, CaptureError, DataError, MetricError, RunError
from halfstep.runtime.deployed import DeployedModel


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def network(digits):
    return train_digits(digits, epochs=5)


@pytest.fixture(scope="module")
def outcome(digits, network, tmp_path_factory):
    return hs.quantize(
        network,
        digits.train_images[:4],
        calibration=iter(digits.calibration_batches()),
        metric=hs.Accuracy(digits.test_batches()),
        directory=tmp_path_factory.mktemp("run"),
    )


def test_the_target_is_met_on_the_deployed_file(digits, outcome):
    assert outcome.met
    assert outcome.rung == "ptq"
    assert outcome.float_score > 0.95
    file = outcome.directory / "model.onnx"
    again = hs.Accuracy(digits.test_batches()).evaluate(DeployedModel(file))
    assert outcome.deployed_score == again.value
    assert outcome.verification.integer_layers == 10
    assert outcome.verification.parity.top1 > 0.99


def test_the_float_score_is_the_users_models(digits, network, outcome):
    with torch.no_grad():
        hits = network(digits.test_images).argmax(1) == digits.test_labels
    assert outcome.float_score == pytest.approx(hits.double().mean().item())


def test_what_was_written(outcome):
    names = {file.name for file in outcome.directory.iterdir()}
    assert names == {"model.onnx", "float.onnx", "outcome.json", "journal.jsonl", "checkpoints", ".lock"}
    record = json.loads((outcome.directory / "outcome.json").read_text())
    assert record["deployed_score"] == outcome.deployed_score
    assert len(record["history"]) == record["evaluations"] == outcome.evaluations == 4


def test_any_callable_is_a_metric(digits, network):
    seen = []

    def metric(model):
        outputs = model(digits.test_images[:50])
        seen.append(type(model).__name__)
        return float((outputs.argmax(1) == digits.test_labels[:50]).float().mean())

    result = hs.quantize(network, digits.train_images[:4], digits.calibration_batches(), metric, max_drop=0.1)
    assert seen == ["QuantizedModel", "QuantizedModel", "QuantizedModel", "DeployedModel"]  # float twice
    assert result.directory is None


def test_calibration_keeps_a_bounded_sample(digits, network):
    q = hs.prepare(network, digits.train_images[:4])
    histograms = hs.observe(q, digits.train_images.split(100))
    assert [len(batch) for batch in q.sample] == [100, 100, 56]
    assert histograms["x"].count == 1197 * 64


def test_few_bits_keep_more_for_what_learns_from_many(monkeypatch):
    x = torch.randn(1100, 4)

    def reserve(recipe, expected):
        q = hs.prepare(LINEAR, x[:2], recipe)
        hs.observe(q, x.split(100))
        assert torch.equal(torch.cat([*q.sample, *q.reserve]), x[: 256 + expected])

    reserve(hs.Recipe.int8(), 0)
    reserve(hs.Recipe.uniform(4, 8), 1024 - 256)
    monkeypatch.setattr(calibrate, "LEARNED_BYTES", 50 * 4 * 4 + 7)
    reserve(hs.Recipe.uniform(8, 4), 50)
    monkeypatch.setattr(calibrate, "LEARNED_EXAMPLES", 260)
    reserve(hs.Recipe.uniform(4, 8), 4)


def test_large_inputs_are_kept_too_up_to_a_bound_that_is_said(monkeypatch):
    """Examples of 4 KiB, where 16 KiB are kept as a rule."""
    monkeypatch.setattr(calibrate, "SAMPLE_BYTES", 2**14)
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, 3))

    def kept(batches, most):
        monkeypatch.setattr(calibrate, "SAMPLE_MOST_BYTES", most)
        q = hs.prepare(network, torch.randn(2, 1024))
        hs.observe(q, batches)
        return [len(batch) for batch in q.sample]

    assert kept(torch.randn(60, 1024).split(6), 2**20) == [6, 6, 4]
    assert kept(torch.randn(10, 1024).split(1), 2**20) == [1] * 10  # there are no more
    with pytest.warns(
        UserWarning, match=r"10 of 60 examples are kept to compare outputs on, since each takes 0 MiB"
    ):
        assert kept(torch.randn(60, 1024).split(6), 10 * 2**12) == [6, 4]
    monkeypatch.setattr(calibrate, "SAMPLE_BYTES", 0)
    with pytest.warns(UserWarning, match=r"1 of 60 examples are kept .* 16 are wanted"):
        assert kept(torch.randn(60, 1024).split(6), 0) == [1]


LINEAR = nn.Linear(4, 3)
GOOD = [torch.randn(8, 4)]
LABELLED = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))]


def small(calibration=GOOD, metric=None, **options):
    return hs.quantize(LINEAR, torch.randn(2, 4), calibration, metric or hs.Accuracy(LABELLED), **options)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], r"got no batch, needed at least one"),
        (
            [torch.randn(8, 4), torch.full((8, 4), float("nan"))],
            r"calibration batch 1: site 'input': 32 of 32 values",
        ),
        ([torch.randn(8, 5)], r"calibration batch 0: input 'input': got shape \(8, 5\), needed \(batch, 4\)"),
        (
            [torch.randn(8, 4).double()],
            r"calibration batch 0: input 'input': got torch.float64, needed torch.float32",
        ),
        ([3], r"calibration batch 0: model inputs: got int, needed a tensor"),
        ([(torch.randn(8, 4), torch.randn(8, 4))], r"calibration batch 0: model inputs: got 2 positional"),
        (
            [(torch.randn(8, 4), torch.zeros(8))],
            r"where labels are among them, leave these out: \[inputs for",
        ),
    ],
)
def test_calibration_data_that_cannot_be_used(calibration, message):
    with pytest.raises(DataError, match=message):
        small(calibration)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (hs.Accuracy([]), r"labelled data are empty"),
        (
            hs.Accuracy([(torch.randn(8, 4), torch.full((8,), 3))]),
            r"labels go from 3 to 3, but the model has 3 classes",
        ),
        (hs.Accuracy([torch.randn(8, 4)]), r"batch 0 is a Tensor, needed a pair"),
        (hs.Metric(LABELLED, lambda o, y: o.sum()), r"gave shape \(\), needed a tensor of shape \(batch,\)"),
        (hs.Metric(LABELLED, lambda o, y: o.sum(1) / 0), r"gave NaN or inf in batch 0"),
        (hs.Metric(LABELLED, lambda o, y: o[:, 7]), r"raised IndexError"),
        (lambda model: float("nan"), r"returned nan, needed a finite number"),
        (lambda model: 1 / 0, r"raised ZeroDivisionError"),
        (5, r"got int, needed hs.Accuracy"),
    ],
)
def test_metrics_that_cannot_be_used(metric, message):
    with pytest.raises(MetricError, match=message):
        small(metric=metric)


def test_other_arguments_that_cannot_be():
    with pytest.raises(ArgumentError, match=r"target: got 'tpu', needed one of 'onnxruntime'"):
        small(target="tpu")
    with pytest.raises(ArgumentError, match=r"max_drop: got -1"):
        small(max_drop=-1)
    with pytest.raises(ArgumentError, match=r"max_drop: got '1%', needed a number, such as 0.01"):
        small(max_drop="1%")
    with pytest.raises(ArgumentError, match=r"floor of 'sure': got None, needed a number"):
        small(floor={"sure": None})
    with pytest.raises(ArgumentError, match=r"recipe: got 'int8', needed a Recipe, such as hs.Recipe.int8"):
        small(recipe="int8")
    for model, got in ((None, "NoneType"), (nn.Linear, "Linear"), (len, "builtin_function_or_method")):
        with pytest.raises(ArgumentError, match=f"model: got {got}, needed a torch.nn.Module, the path"):
            hs.quantize(model, torch.randn(2, 4), GOOD, hs.Accuracy(LABELLED), directory="unused")


def test_a_name_is_one_rung_and_not_its_letters():
    with pytest.raises(ArgumentError, match=r"rungs: got 'partial', needed 'ptq' first"):
        small(rungs="partial")


def test_what_has_nothing_to_quantize_is_told_what_there_is():
    recurrent = nn.GRU(4, 3, batch_first=True)
    with pytest.raises(CaptureError, match=r"nothing of the network is to be quantized: '.*' .*onnxruntime"):
        hs.quantize(
            recurrent, torch.randn(2, 5, 4), [torch.randn(8, 5, 4)], hs.Cosine([torch.randn(8, 5, 4)])
        )


def test_a_directory_that_cannot_be_written_is_found_before_any_work(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunError, match=r"file.* cannot be written"):
        small(calibration=None, directory=tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("asked", "needed"),
    [
        (
            ["partial"],
            r"'partial', needed 'ptq' first: .*; give rungs=\['ptq', 'partial'\] \(--rungs ptq,partial\)",
        ),
        (["qat"], r"'qat', needed 'ptq' first: .*; give rungs=\['ptq', 'qat'\] \(--rungs ptq,qat\)"),
        (
            ["qat", "ptq"],
            r"'qat', 'ptq', needed each once and from the bottom up; give rungs=\['ptq', 'qat'\] \(--rungs ptq,qat\)",
        ),
        (
            ["ptq", "ptq"],
            r"'ptq', 'ptq', needed each once and from the bottom up; give rungs=\['ptq'\] \(--rungs ptq\)",
        ),
    ],
)
def test_rungs_are_climbed_from_the_bottom_up(asked, needed):
    with pytest.raises(ArgumentError, match=f"rungs: got {needed}$"):
        small(calibration=None, rungs=asked)


def test_rungs_and_budgets_that_cannot_be():
    with pytest.raises(
        ArgumentError, match=r"rungs: got 'ptk', needed some of 'ptq'.*; did you mean 'ptq'\?"
    ):
        small(rungs=("ptk",))
    with pytest.raises(ArgumentError, match=r"rungs: got 'QAT', .*; did you mean 'qat'\?"):
        small(rungs=("ptq", "QAT"))
    with pytest.raises(ArgumentError, match=r"rungs: got none"):
        small(rungs=())
    with pytest.raises(ArgumentError, match=r"budget: evaluations is 0, needed a number above 0"):
        small(budget=hs.Budget(evaluations=0))
