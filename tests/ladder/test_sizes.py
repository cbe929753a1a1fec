"""A climb over every rung on batches of different length, and what its file answers at other lengths."""

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel


class Tagger(nn.Module):
    """Says of a text how often a word stands in it, as one of three classes."""

    def __init__(self, width=16):
        super().__init__()
        self.words = nn.Embedding(20, width)
        self.first, self.second = nn.Linear(width, 32), nn.Linear(32, 3)

    def forward(self, ids, mask):
        kept = mask[..., None].to(torch.float32)
        x = torch.relu(self.first(self.words(ids)))
        return self.second((x * kept).sum(1) / kept.sum(1))


def batch(tokens, seed, size=16):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (size, tokens), generator=random)
    mask = (torch.arange(tokens) < torch.randint(2, tokens + 1, (size, 1), generator=random)).long()
    return {"ids": ids, "mask": mask}


@pytest.fixture(scope="module")
def texts():
    torch.manual_seed(0)
    model = Tagger().eval()
    with torch.no_grad():
        inputs = [batch(tokens, tokens) for tokens in (4, 7, 12, 5)]
        return model, [(x, model(**x).argmax(1)) for x in inputs]


def test_every_rung_takes_batches_of_different_length(texts, tmp_path):
    model, labelled = texts
    training = hs.Training(labelled, nn.functional.cross_entropy, epochs=1, learning_rate=1e-3)
    outcome = hs.quantize(
        model,
        batch(6, 9, 2),
        calibration=[batch(tokens, 50 + tokens) for tokens in (3, 9)],
        metric=hs.Accuracy(labelled),
        max_drop=0.0,
        recipe=hs.Recipe.uniform(2, 3, ends=None),
        partial=hs.Partial(keep_quantized=["*"]),
        max_float=0.0,
        training=training,
        dynamic={"ids": {1: "tokens"}, "mask": {1: "tokens"}},
        directory=tmp_path / "run",
        threads=1,
    )
    assert [step.rung for step in outcome.path] == ["ptq", "partial", "qat"]
    assert list(outcome.verification.sizes) == ["tokens 9"]  # beside the first batch, of 3
    assert set(outcome.to_dict()["latency_by_size"]["tokens 9"]) == {"float", "null", "quantized"}
    outcome.report(tmp_path / "report.html")
    assert "at tokens 9" in (tmp_path / "report.html").read_text()
    assert outcome.deployed_score == pytest.approx(outcome.score, abs=0.02)
    model = outcome.model
    file = DeployedModel(tmp_path / "run" / "model.onnx", model.captured.in_spec, model.captured.out_spec)
    assert compare(model, file, [batch(15, 3)]).sqnr > 60
