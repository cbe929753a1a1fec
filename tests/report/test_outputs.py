"""Whatever a model returns, its run has a summary, a page, a notebook's table, a comparison and strict JSON."""

import json

import pytest
import torch
from rich.console import Console
from torch import nn

import halfstep as hs
from halfstep.cli.console import summary
from halfstep.ladder.outcome import run_facts
from halfstep.report.page import page
from halfstep.report.run import Run, comparison

ROWS, IMAGES = torch.randn(96, 4), torch.rand(96, 1, 6, 6)
SAME, NOISE = "same answer as the simulation", "outputs against the simulation's"


class Several(nn.Module):
    """Logits in a dict, with what was made of them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x):
        logits = self.body(x)
        return {"answer": logits.argmax(1), "logits": logits, "level": x.mean(1)}


class Answer(nn.Module):
    """The class alone."""

    def __init__(self):
        super().__init__()
        self.body = linear(3)

    def forward(self, x):
        return self.body(x).argmax(1)


def linear(outputs):
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, outputs))


def error(outputs, wanted):
    outputs = outputs["logits"] if isinstance(outputs, dict) else outputs
    return (outputs - wanted).square().reshape(len(wanted), -1).mean(1)


def right(outputs, wanted):
    return (outputs == wanted).float()


def errors(labelled):
    return hs.Metric(labelled, error, higher_is_better=False)


KINDS = {
    "one column": (lambda: linear(1), ROWS, errors, {NOISE}),
    "three numbers": (lambda: linear(3), ROWS, errors, {NOISE}),
    "maps": (lambda: nn.Conv2d(1, 3, 3, padding=1), IMAGES, errors, {NOISE}),
    "classes": (lambda: linear(3), ROWS, hs.Accuracy, {SAME, NOISE}),
    "several": (Several, ROWS, errors, {NOISE}),
    "integers": (Answer, ROWS, lambda labelled: hs.Metric(labelled, right), {SAME}),
    "equal": (lambda: nn.Embedding(8, 4), torch.arange(96) % 8, errors, {NOISE}),
}


def refuse(constant):
    raise ValueError(f"{constant} is no JSON")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of so few data
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_is_told_of(kind, tmp_path):
    make, inputs, metric, rows = KINDS[kind]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        wanted = model(inputs)
    wanted = wanted["logits"] if isinstance(wanted, dict) else wanted
    labels = wanted.argmax(1) if metric is hs.Accuracy else wanted
    outcome = hs.quantize(
        model,
        inputs[:2],
        [inputs[:48]],
        metric([(inputs[48:], labels[48:])]),
        0.2,
        directory=tmp_path,
        threads=1,
    )
    parity = outcome.verification.parity
    assert outcome.met and (parity.equal or kind != "equal")
    rows = rows | {NOISE} if parity.equal else rows

    console = Console(width=200)
    with console.capture() as printed:
        console.print(summary(outcome))
    run = Run.read(tmp_path)
    web = page(run).replace("&#x27;", "'")
    assert {row for row in (SAME, NOISE) if row in printed.get()} == rows
    assert {row for row in (SAME, NOISE) if row in web} == rows
    assert ("equal to the last bit" in printed.get()) == ("equal to the last bit" in web) == parity.equal
    assert "deployed score" in outcome._repr_html_()
    score = f"{outcome.deployed_score:.4f}"
    assert ("deployed score", score, score) in comparison(run, run)

    assert run.facts() == outcome.facts()
    for fact in outcome.facts():
        assert fact.name in outcome._repr_html_().replace("&#x27;", "'") and fact.name in web
        assert fact.name in printed.get() and (fact.name, fact.words, fact.words) in comparison(run, run)

    assert run.outcome["parity"]["top1"] == parity.top1
    json.loads((tmp_path / "outcome.json").read_text(), parse_constant=refuse)
    for line in (tmp_path / "journal.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_numbers_that_a_journal_cannot_keep_are_shown_all_the_same():
    latency = {"median": 1.0, "spread": 0.1, "speedup": 1.5}
    metric = {"metric": "night", "float_score": 0.5, "score": None, "drop": None, "low": None, "high": None}
    record = {
        "float_score": 0.5,
        "score": None,
        "deployed_score": None,
        "max_drop": 0.01,
        "metrics": [{**metric, "max_drop": 0.01, "met": False}],
        "rung": "ptq",
        "float_layers": ["a", "b"],
        "evaluations": 3,
        "parity": {"top1": None, "sqnr": None, "examples": 0},
        "layers": [{"name": "a", "integer": False}],
        "latency_ms": {"quantized": latency, "null": latency},
        "bytes": 2048,
        "float_bytes": 4096,
    }
    words = {fact.name: fact.words for fact in run_facts(record)}
    assert (words["float score"], words["deployed score"]) == ("0.5000", "nan")
    assert words["night"] == "0.5000 to nan, drop +nan (allowed 0.01), not met"
    assert words["layers left in float"] == "a, b" and words["file size"] == "2 KiB, 0.50 of float"
