"""The picture of a site."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.calibrators import levels
from halfstep.calibrators.error import Slabs
from halfstep.errors import ArgumentError, NotObservedError
from halfstep.formats import Codebook
from halfstep.report.site_plot import _shares, site_figure
from halfstep.statistics import Histogram

pytest.importorskip("matplotlib")


def histogram(values):
    seen = Histogram()
    seen.update(values)
    return seen


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    q = hs.prepare(nn.Linear(4, 3), torch.randn(2, 4), recipe=hs.Recipe.uniform(4, 4))
    hs.observe(q, [torch.randn(500, 4)])
    return q


def test_levels_are_what_the_format_represents():
    assert levels(hs.Integer(2), -3.0, 3.0).tolist() == [-3, 0, 3]
    affine = hs.Integer(2, signed=False, symmetric=False)
    assert levels(affine, -1.0, 2.0).tolist() == [-1, 0, 1, 2]
    assert levels(Codebook.ternary(), -2.0, 2.0).tolist() == [-2, 0, 2]


def test_bars_hold_every_value_once():
    values = torch.cat([torch.randn(1000), torch.zeros(500), torch.full((10,), 3.0)])
    edges = np.linspace(-6, 6, 25)
    shares = _shares(Slabs.of(histogram(values)), edges)
    counted = np.histogram(values.numpy(), edges)[0] / len(values)
    assert shares.sum() == pytest.approx(1)
    assert np.abs(shares - counted).max() < 0.01  # what lies in the bins that an edge cuts


def test_a_row_for_every_calibrator_and_the_levels_of_the_range_in_use(model):
    hs.calibrate(model)
    figure = hs.plot_site(model, "input", (hs.Max(), hs.MSE()))
    upper, lower = figure.axes
    assert [label.get_text() for label in lower.get_yticklabels()] == ["max", "mse"]
    assert len(upper.collections[0].get_segments()) == 16
    assert upper.get_title(loc="left") == "input: u4 affine, per tensor"
    assert lower.texts[0].get_text().endswith(" dB")
    assert "clips" in lower.texts[1].get_text()


def test_an_outlier_bends_the_axis():
    seen = histogram(torch.cat([torch.randn(1000), torch.tensor([500.0])]))
    figure = site_figure(seen, hs.Integer(4), {"max": (-500.0, 500.0), "mse": (-3.0, 3.0)})
    assert figure.axes[0].get_xscale() == "symlog"
    assert site_figure(seen, hs.Integer(4), {"max": (-500.0, 500.0)}).axes[0].get_xscale() == "linear"


def test_a_weight_is_drawn_in_its_steps(model):
    hs.calibrate(model)
    figure = hs.plot_site(model, "weight")
    assert figure.axes[0].get_title(loc="left").endswith("in steps of its scales")
    low, high = figure.axes[1].get_xlim()
    assert low < -7 < 7 < high


def test_it_can_be_written(model, tmp_path):
    hs.plot_site(model, "input").savefig(tmp_path / "site.png", dpi=40)
    assert (tmp_path / "site.png").stat().st_size > 1000


def test_what_cannot_be_drawn():
    q = hs.prepare(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(ArgumentError, match=r"site: got 'nowhere', needed one of 'input', 'weight'"):
        hs.plot_site(q, "nowhere")
    with pytest.raises(NotObservedError, match=r"site 'input': no finite value was observed"):
        hs.plot_site(q, "input")
    with pytest.raises(NotObservedError, match=r"site 'weight': has no range yet"):
        hs.plot_site(q, "weight")
    q = hs.prepare(nn.Linear(4, 3), torch.randn(2, 4), recipe=hs.Recipe.dynamic())
    site = next(name for name, module in q.sites.items() if module.dynamic)
    with pytest.raises(ArgumentError, match=r"its range is computed from each input at run time"):
        hs.plot_site(q, site)


def test_without_matplotlib_it_says_what_to_install():
    code = (
        "import sys, torch; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "import halfstep as hs\nfrom halfstep.statistics import Histogram\n"
        "from halfstep.report.site_plot import site_figure\n"
        "try: site_figure(Histogram(), hs.Integer(8), {})\n"
        "except hs.HalfstepError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "plots need matplotlib: pip install 'halfstep[plot]'"
