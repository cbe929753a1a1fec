"""Codebooks fitted to a histogram."""

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.calibrators import fitted_codebook
from halfstep.errors import FormatError, NotObservedError
from halfstep.functional import fake_quantize, kmeans_codebook
from halfstep.statistics import Histogram


def seen(x):
    histogram = Histogram()
    histogram.update(x)
    return histogram


def error(x, codebook):
    return float((fake_quantize(x, torch.tensor(1.0), None, codebook) - x).square().mean())


def test_few_values_are_fitted_exactly():
    x = torch.tensor([0.0, 1.0, 10.0, 12.0] * 5)
    assert fitted_codebook(seen(x), bits=1).values.tolist() == [0.5, 11.0]
    assert fitted_codebook(seen(x), bits=2).values.tolist() == [0.0, 1.0, 10.0, 12.0]


def test_as_good_as_fitted_to_the_samples_themselves():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert error(x, fitted_codebook(seen(x), 3)) <= error(x, kmeans_codebook(x, 3)) * 1.001


def test_the_optimum_of_the_normal_distribution():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert error(x, fitted_codebook(seen(x), 2)) == pytest.approx(0.1175, rel=0.01)


def test_a_site_can_have_one_of_its_own():
    torch.manual_seed(0)
    x = torch.randn(256, 4).exp()  # a long tail, which uniform levels suit badly
    q = hs.prepare(nn.Linear(4, 3), x[:2], recipe=hs.Recipe.uniform(8, 4))
    hs.observe(q, [x])
    hs.calibrate(q, hs.MSE())
    site = q.sites["input"]
    uniform = float((site.rounded(x) - x).square().mean())
    site.format = fitted_codebook(site.histogram, 4)
    hs.calibrate(q, hs.MSE())
    assert float((site.rounded(x) - x).square().mean()) < uniform / 2
    with torch.no_grad():
        assert len(torch.unique(site(x))) <= 16


def test_what_cannot_be_fitted():
    with pytest.raises(NotObservedError, match="no finite value was observed"):
        fitted_codebook(Histogram(), 4)
    with pytest.raises(FormatError, match="bits: got 9, needed 1 to 8"):
        fitted_codebook(seen(torch.randn(10)), 9)
