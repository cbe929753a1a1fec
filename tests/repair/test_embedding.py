"""Repairs of a network whose first layer is a table: it reads no activation and has no rows to repair."""

import pytest
import torch
from torch import nn

import halfstep as hs


@pytest.mark.parametrize("recipe", [hs.Recipe.int8(), hs.Recipe.dynamic()])
def test_a_table_is_passed_over_and_what_follows_is_repaired(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(32, 16), nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 4)
    )
    model[1].weight.data[3] = 100.0
    tokens = torch.arange(64).reshape(8, 8) % 32
    q = hs.prepare(model.eval(), tokens, recipe=recipe)
    hs.observe(q, [tokens])
    hs.calibrate(q, hs.MSE())
    assert any(treated.after < treated.before for treated in hs.migrate(q).treated)
    for step in (hs.equalize, hs.weigh_ranges, hs.gptq, hs.correct_bias):
        assert not any(treated.name == "0" for treated in step(q).treated)
    with torch.no_grad():
        assert q(tokens).isfinite().all()
