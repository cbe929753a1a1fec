"""The report: made from the journal alone, and shown by a real browser."""

import json

import browser
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import RunError
from halfstep.journal import Journal, read
from halfstep.report.chart import ticks
from halfstep.report.html import number, size
from halfstep.report.page import page, write_report
from halfstep.report.run import Run

DOWN, END = "\ue015", "\ue010"
LARGEST = 6e6  # bytes that a page may have


class Net(nn.Module):
    """Two convs and a linear, on images of 8x8."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.flatten(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run over every rung, with a name that must be escaped."""
    folder = tmp_path_factory.mktemp("runs") / "a <run> & more"
    torch.manual_seed(0)
    images = torch.rand(192, 1, 8, 8)
    model = Net()
    with torch.no_grad():
        labels = model(images).argmax(1)
        labels[::4] = (labels[::4] + 1) % 4
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    outcome = hs.quantize(
        model,
        images[:4],
        calibration=[x for x, _ in batches[:3]],
        metric=hs.Accuracy(batches[3:]),
        max_drop=0.0,
        strict=True,  # which no file of 96 examples can keep, so that every rung is climbed
        recipe=hs.Recipe.uniform(3, 4),
        training=hs.Training(batches[:3], nn.functional.cross_entropy, epochs=2),
        partial=hs.Partial(keep_quantized=("second",)),
        directory=folder,
        threads=1,
        command="halfstep quantize <model>",
    )
    outcome.report(folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return Run.read(folder)


@pytest.fixture(scope="module")
def window(folder, tmp_path_factory):
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.Browser(tmp_path_factory.mktemp("profile")) as window:
        window.open((folder / "report.html").as_uri())
        yield window


def test_every_rung_is_told_of(run):
    assert [step["rung"] for step in run.steps] == ["ptq", "partial", "qat"]
    text = page(run)
    for title in (
        "The ladder",
        "Calibrators",
        "Histograms",
        "Sensitivity",
        "Layers",
        "Training",
        "To do it again",
    ):
        assert f">{title}</h2>" in text
    assert not run.outcome["met"] and "What would help" in text


def test_the_page_needs_nothing_and_is_small(folder):
    text = (folder / "report.html").read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "<run>" not in text and "&lt;run&gt;" in text and "&lt;model&gt;" in text
    assert len(text) < LARGEST


def test_the_outcome_and_the_directory_give_the_same_page(folder, run):
    assert (folder / "report.html").read_text() == page(run)


def test_a_run_that_was_killed_has_a_page_too(folder, tmp_path):
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    ending = next(index for index, line in enumerate(lines) if b'"kind":"outcome"' in line)
    for count in (1, len(lines) // 2, ending):
        (tmp_path / "journal.jsonl").write_bytes(b"".join(lines[:count]) + lines[count][:-9])
        written = write_report(Run.read(tmp_path), tmp_path / "report.html")
        assert "not finished" in written.read_text()


def test_a_page_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunError, match=r"cannot write .*report.html: "):
        write_report(run, tmp_path / "file" / "report.html")


def test_no_console_error(window):
    assert [line for line in window.log() if line["level"] in ("SEVERE", "WARNING")] == []


def test_figures_in_the_page_equal_the_journals(window, folder):
    script = (
        "return [...document.querySelectorAll('[data-figure]')].map(e => [e.dataset.figure, e.dataset.value])"
    )
    shown = dict(window.run(script))
    entries = read(folder)
    end = next(entry.data for entry in reversed(entries) if entry.kind == "outcome")
    for name in ("float_score", "score", "deployed_score", "max_drop", "evaluations"):
        assert float(shown[name]) == end[name]
    assert float(shown["speedup"]) == end["measured"]["latency_ms"]["quantized"]["speedup"]
    made = [entry.data for entry in entries if entry.kind == "evaluation"]
    assert [float(shown[f"evaluation {i}"]) for i in range(len(made))] == [e["score"]["value"] for e in made]
    for entry in entries:
        if entry.kind == "step":
            assert float(shown[f"step {entry.data['rung']}"]) == entry.data["score"]
        if entry.kind == "finding" and entry.data["name"] == "sensitivity":
            for row in entry.data["measured"]["finding"]["rows"]:
                assert float(shown[f"sensitivity {', '.join(row['layers'])}"]) == row["score"]
    for layer in end["layers"]:
        assert float(shown[f"µs {layer['name']}"]) == end["measured"]["microseconds"][layer["name"]]
    for point in end["measured"]["files"]:
        assert float(shown[f"file {point['name']}"]) == point["score"]


def test_the_site_picker_works_by_keyboard(window, run):
    chosen = "return document.getElementById('site').dataset.name"
    names = "return [...document.getElementById('list').options].map(o => o.text)"
    assert window.run(chosen) == run.sites[0]["name"]
    assert len(window.run(names)) == len(run.sites)
    window.type("#list", DOWN)
    assert window.run(chosen) == run.sites[1]["name"]
    window.type("#list", END)
    assert window.run(chosen) == run.sites[-1]["name"]
    window.type("#search", "second.weight")
    assert window.run(names) == ["second.weight (weight)"]
    assert window.run(chosen) == "second.weight"
    site = next(site for site in run.sites if site["name"] == "second.weight")
    bars = window.run("return document.querySelectorAll('#site rect.bar').length")
    assert bars == sum(count > 0 for count in site["bars"]["counts"])
    assert f"{site['sqnr']:.1f} dB" in window.run("return document.getElementById('site').innerText")
    window.type("#search", "nothing like it")
    assert window.run(names) == []


@pytest.mark.parametrize(("dark", "width"), [(True, 1200), (False, 500)])
def test_dark_and_narrow(folder, tmp_path, dark, width):
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.Browser(tmp_path / "profile", dark, width) as window:
        window.open((folder / "report.html").as_uri())
        ground = window.run("return getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)")
        overflow = window.run(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert overflow <= 0  # wide tables scroll in their own frames
        hidden = window.run(
            "return [...document.querySelectorAll('section, nav')].filter(e => !e.getBoundingClientRect().width)"
        )
        assert hidden == []


def test_every_picture_has_words(window):
    silent = "return [...document.querySelectorAll('img, svg')].filter(e => !(e.alt || e.getAttribute('aria-label')))"
    assert window.run(silent) == []


def test_sites_add_up(run):
    for site in run.sites:
        assert site["min"] >= site["bars"]["low"] or sum(site["bars"]["counts"]) < site["count"]
        assert sum(site["bars"]["counts"]) <= site["count"]
        assert 0 <= site["clipped"] <= 1
        if site["levels"] is not None:
            assert len(site["levels"]) <= 2 ** site["bits"]
            assert site["levels"][0] == pytest.approx(site["low"], abs=1e-6)
            assert site["levels"][-1] == pytest.approx(site["high"], abs=1e-6)


def test_numbers_that_json_does_not_know_become_none():
    journal = Journal()
    journal.write("x", value=float("inf"), deep=[float("nan"), {"a": 1.5}])
    assert journal.entries[0].data == {"value": None, "deep": [None, {"a": 1.5}]}
    json.dumps(journal.entries[0].data, allow_nan=False)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ((-3, 3), [-2, 0, 2]),
        ((0.97, 0.991), [0.97, 0.975, 0.98, 0.985, 0.99]),
    ],
)
def test_ticks_are_round_numbers_inside(ends, expected):
    assert ticks(ends) == pytest.approx(expected)


def test_words_for_numbers():
    assert (number(None), number(float("inf")), number(0.123456, 3)) == ("–", "–", "0.123")
    assert (size(1023), size(2048), size(3 * 2**20), size(2**31)) == (
        "1023 B",
        "2.0 KiB",
        "3.0 MiB",
        "2.00 GiB",
    )
