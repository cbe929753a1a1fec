"""Recipes: what they ask for, and what they refuse."""

import pytest

import halfstep as hs
from halfstep.errors import RecipeError
from halfstep.formats import Codebook
from halfstep.recipe import match_layers


def test_dynamic_recipes():
    spec = hs.Recipe.dynamic().spec("any")
    assert spec == hs.LayerSpec(hs.TensorSpec(8), hs.TensorSpec(8, dynamic=True))
    grouped = hs.Recipe.dynamic(4, group=32).spec("any")
    assert grouped.weights == hs.TensorSpec(4, hs.PerGroup(1, 32))
    assert grouped.activations == hs.TensorSpec(8, hs.PerGroup(-1, 32), dynamic=True)


def test_any_spec_can_be_made_dynamic():
    assert hs.LayerSpec().with_dynamic_activations() == hs.Recipe.dynamic().default
    weight_only = hs.Recipe.weight_only(4, 64).default
    assert weight_only.with_dynamic_activations() == hs.Recipe.dynamic(4, 64).default


def test_a_layer_s_name_matches_itself_also_where_it_means_something_else_as_a_pattern():
    recipe = hs.Recipe.int8().override("rows.a[0]", None)
    assert recipe.spec("rows.a[0]") is None
    assert recipe.spec("rows.b[0]") == hs.LayerSpec()
    recipe.check(["rows.a[0]", "rows.b[0]"])
    assert match_layers("a[0]", ["a[0]", "a0"]) == ["a[0]"]
    assert match_layers("a[0]", ["b", "a0"]) == ["a0"]
    with pytest.raises(
        RecipeError, match=r"pattern 'c\[0\]' matches no layer; the nearest names are 'a\[0\]'"
    ):
        match_layers("c[0]", ["a[0]"])


IN_GROUPS = hs.TensorSpec(8, hs.PerGroup(-1, 32), dynamic=True)
BAD = {
    "range of a weight": (
        lambda: hs.LayerSpec(hs.TensorSpec(8, dynamic=True)),
        "weights: got dynamic=True",
    ),
    "4 bits": (lambda: hs.TensorSpec(4, dynamic=True), "got 4, needed 8 bits"),
    "a codebook": (lambda: hs.TensorSpec(Codebook.mu_law(8), dynamic=True), "needed 8 bits"),
    "per channel": (lambda: hs.TensorSpec(8, hs.PerChannel(1), dynamic=True), "got ranges per channel"),
    "odd groups": (lambda: hs.Recipe.dynamic(4, group=100), "groups of 16, 32, 64"),
    "tiny groups": (lambda: hs.Recipe.dynamic(4, group=8), "groups of 16, 32, 64"),
    "16-bit weights": (lambda: hs.Recipe.dynamic(16), "got 16 bits, needed 2 to 8"),
    "groups beside channels": (
        lambda: hs.LayerSpec(hs.TensorSpec(8), IN_GROUPS),
        r"got weights per channel, needed weights in the same groups; hs.Recipe.dynamic\(4, group=32\)",
    ),
    "groups beside float": (lambda: hs.LayerSpec(None, IN_GROUPS), "got weights float"),
    "groups beside a codebook": (
        lambda: hs.LayerSpec(hs.TensorSpec(Codebook.nf4(), hs.PerGroup(1, 32)), IN_GROUPS),
        "got weights in NF4 of 16, needed integers of 2 to 8 bits",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_kernel_computes_is_refused(name):
    make, message = BAD[name]
    with pytest.raises(RecipeError, match=message):
        make()
