"""What pictures need of sites: by definition, in little memory, and said where some are left out."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.ladder import deploy, site_records
from halfstep.ladder.site_records import record_sites
from halfstep.report.page import page
from halfstep.report.run import Run
from halfstep.statistics import Histogram
from tests.ladder.climbing import climb


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    q = hs.prepare(
        nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(4, 40),
        hs.Recipe.uniform(4, 8, hs.PerTensor()),
    )
    hs.observe(q, [torch.randn(1024, 40)])
    hs.calibrate(q, hs.Percentile(99.0), hs.MSE())
    return q


def of(found, name):
    return next(site for site in found["sites"] if site["name"] == name)


def test_a_weight_is_what_its_definition_says(model):
    site = of(record_sites(model), "0.weight")
    weight = model.weight("0.weight").detach().double().numpy().ravel()
    rounded = model.sites["0.weight"].rounded(model.weight("0.weight")).detach().double().numpy().ravel()
    assert (site["count"], site["min"], site["max"]) == (2000, weight.min(), weight.max())
    outside = (weight < site["low"]) | (weight > site["high"])
    assert site["clipped"] == outside.mean() and 0 < outside.mean() < 0.2
    decibels = 10 * math.log10((weight**2).sum() / ((weight - rounded) ** 2).sum())
    assert site["sqnr"] == pytest.approx(decibels, abs=0.006)
    bars = site["bars"]
    counted, _ = np.histogram(weight, site_records.BARS, (bars["low"], bars["high"]))
    assert sum(bars["counts"]) == 2000
    # A bin of the statistics is drawn at its mean: it may fall on the other side of a bar's edge.
    assert np.abs(np.cumsum(counted) - np.cumsum(bars["counts"])).max() <= 20


def test_no_more_of_a_weight_is_looked_at_together_than_a_block(model, monkeypatch):
    whole = record_sites(model)
    sizes = []

    class Measured(Histogram):
        def update(self, x):
            sizes.append(x.numel())
            super().update(x)

    monkeypatch.setattr(site_records, "BLOCK", 300)
    monkeypatch.setattr(site_records, "Histogram", Measured)
    assert record_sites(model) == whole
    weights = [model.weight(f"{name}.weight").numel() for name in (0, 2, 4)]
    assert max(sizes) == 300 and len(sizes) == sum(-(-weight // 300) for weight in weights)


def test_of_many_sites_some_of_each_kind_are_taken(model, monkeypatch):
    every = record_sites(model)
    assert every["of"] == len(every["sites"]) >= 6
    monkeypatch.setattr(site_records, "SITES", 4)
    some = record_sites(model)
    assert len(some["sites"]) == 4 and some["of"] == every["of"]
    assert {site["weight"] for site in some["sites"]} == {True, False}
    assert all(site in every["sites"] for site in some["sites"])


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")]
)
def test_a_weight_without_memory_is_left_out(model, monkeypatch, error):
    def short(module, weight):
        if module.name == "2.weight":
            raise error
        return draw(module, weight)

    draw = site_records._weight
    every = record_sites(model)
    monkeypatch.setattr(site_records, "_weight", short)
    some = record_sites(model)
    assert [s["name"] for s in some["sites"]] == [
        s["name"] for s in every["sites"] if s["name"] != "2.weight"
    ]
    assert some["of"] == every["of"]


def test_any_other_error_is_no_shortage(model, monkeypatch):
    def broken(module, weight):
        raise RuntimeError("a shape")

    monkeypatch.setattr(site_records, "_weight", broken)
    with pytest.raises(RuntimeError, match="a shape"):
        record_sites(model)


class Killed(BaseException):
    """What the system does to a process that takes too much memory."""


def test_the_outcome_is_on_the_disk_before_anything_is_drawn(tmp_path, monkeypatch):
    def killed(model):
        raise Killed

    monkeypatch.setattr(deploy, "record_sites", killed)
    with pytest.raises(Killed):
        climb(tmp_path, rungs=("ptq",), max_drop=1.0)
    assert json.loads((tmp_path / "outcome.json").read_text())["met"]
    run = Run.read(tmp_path)
    assert run.outcome["met"] and run.sites == () and "Histograms</h2>" not in page(run)
    monkeypatch.undo()
    monkeypatch.setattr(site_records, "SITES", 2)
    climb(tmp_path, rungs=("ptq",), max_drop=1.0)
    run = Run.read(tmp_path)
    assert len(run.sites) == 2 < run.known_sites
    assert (
        f"2 of {run.known_sites} sites are shown, taken evenly from activations and weights alike."
        in page(run)
    )
