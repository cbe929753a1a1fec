"""Configuration files: what is read, and how each mistake is named."""

import pytest
import yaml
from torch import nn

import halfstep as hs
from halfstep.cli.config import Config, commented, make_config, read_config, to_yaml
from halfstep.cli.job import Job, config_from
from halfstep.errors import ArgumentError

GOOD = """\
model: a.b:c
labelled: test.npz
calibration: train.npz
recipe:
  weights: 4
training:
  data: train.npz
  epochs: 2
budget: {minutes: 1.5}
"""


def test_defaults_are_filled_in(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    config = read_config(path, {"threads": 2})
    assert (config.recipe.weights, config.recipe.activations) == (4, 8)
    assert (config.training.epochs, config.training.loss) == (2, "cross_entropy")
    assert (config.budget.minutes, config.budget.evaluations, config.threads) == (1.5, None, 2)
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"weights": 4}, hs.Recipe.uniform(4, 8)),
        ({"kind": "dynamic"}, hs.Recipe.dynamic()),
        ({"kind": "dynamic", "weights": 4, "group": 32}, hs.Recipe.dynamic(4, 32)),
        ({"kind": "weight_only"}, hs.Recipe.weight_only(4, 128)),
        ({"kind": "weight_only", "weights": 8, "group": None}, hs.Recipe.weight_only(8, None)),
    ],
)
def test_a_kind_of_recipe_has_its_own_defaults(given, wanted):
    config = make_config({"model": "a:b", "labelled": "c", "calibration": "d", "recipe": given}, "here")
    assert Job(config, nn.Identity(), [], None).recipe() == wanted
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("recipe:", "recipes:"), r"bad.yaml, line 4: unknown key 'recipes'; did you mean 'recipe'\?"),
        (("weights: 4", "wieghts: 4"), r"line 5: unknown key 'recipe.wieghts'; did you mean 'weights'\?"),
        (("epochs: 2", "epoch: 2"), r"line 8: unknown key 'training.epoch'; did you mean 'epochs'\?"),
        (("epochs: 2", "qqqqqq: 2"), r"line 8: unknown key 'training.qqqqqq'; known are data, loss, epochs"),
        (("weights: 4", "weights: four"), r"line 5: recipe.weights is 'four', needed a whole number"),
        (("weights: 4", "weights: '4'"), r"line 5: recipe.weights is '4', needed a whole number"),
        (("weights: 4", "weights: 1"), r"line 5: recipe.weights is 1, needed greater than or equal to 2"),
        (
            ("weights: 4", "kind: dynamical"),
            r"line 5: recipe.kind is 'dynamical', needed 'static', 'dynamic' or",
        ),
        (("weights: 4", "group: 32"), r"line 4: recipe: group is 32 beside kind static, needed null"),
        (
            ("weights: 4", "{kind: dynamic, weights: 16}"),
            r"line 4: recipe: weights is 16 beside kind dynamic, needed 2 to 8",
        ),
        (
            ("weights: 4", "{kind: weight_only, activations: 8}"),
            r"line 4: recipe: activations is 8 beside kind weight_only, needed null",
        ),
        (("minutes: 1.5", "minutes: -1"), r"line 9: budget.minutes is -1, needed greater than 0"),
        (("labelled: test.npz\n", ""), r"bad.yaml: labelled is missing: data to judge on"),
        (("  data: train.npz\n", ""), r"bad.yaml: training.data is missing: labelled batches"),
        (
            ("recipe:\n  weights: 4", "recipe: int8"),
            r"line 4: recipe is 'int8', needed keys and values: kind, weights, activations, ",
        ),
        (
            ("  data: train.npz\n  epochs: 2", " t.npz"),
            r"training is 't.npz', needed keys and values: data, loss, ",
        ),
        (
            ("budget: {minutes: 1.5}", "budget: 30"),
            r"budget is 30, needed keys and values: evaluations, minutes$",
        ),
        (("budget: {minutes: 1.5}", "rungs: ptq"), r"rungs is 'ptq', needed a list$"),
        (("budget: {minutes: 1.5}", "strict: maybe"), r"strict is 'maybe', needed true or false$"),
        (
            ("budget: {minutes: 1.5}", "directory: 2024"),
            r"directory is 2024, needed a text: in quotes if it looks like",
        ),
        (
            ("budget: {minutes: 1.5}", "max_drop: 1%"),
            r"max_drop is '1%', needed a number, without quotes or unit$",
        ),
        (("budget: {minutes: 1.5}", "1: 2"), r"unknown key '1'; known are model, weights, labelled"),
        (("budget: {minutes: 1.5}", "? [a]\n: b"), r"bad.yaml, line 9: no YAML: found unhashable key"),
        (("  epochs: 2", "  data: test.npz"), r"bad.yaml, line 8: no YAML: 'data' stands there twice$"),
        (("model: a.b:c", "model: [a"), r"line \d+: no YAML: "),
        ((GOOD, "- a\n- b\n"), r"bad.yaml: got a list, needed keys and values"),
        ((GOOD, ""), r"bad.yaml: got a NoneType, needed keys and values"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, change, message):
    path = tmp_path / "bad.yaml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(ArgumentError, match=message):
        read_config(path)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1e-3", ".1e-2", "1.e-3", "0.001", "1.0e-03"])
def test_numbers_are_written_as_anywhere(tmp_path, number):
    path = tmp_path / "numbers.yaml"
    path.write_text(GOOD.replace("epochs: 2", f"learning_rate: {number}") + f"max_drop: {number}\n")
    config = read_config(path)
    assert config.max_drop == config.training.learning_rate == 0.001
    path.write_text(GOOD + f"max_drop: '{number}'\n")
    with pytest.raises(ArgumentError, match=r"line 10: max_drop is '.*', needed a number, without quotes"):
        read_config(path)


def test_what_looks_like_a_number_is_kept_as_text(tmp_path):
    config = make_config({"model": "a:b", "labelled": "1e5", "calibration": "d", "max_drop": 1e-5}, "here")
    (tmp_path / "kept.yaml").write_text(to_yaml(config.model_dump()))
    assert read_config(tmp_path / "kept.yaml") == config


#: What a flag adds to the file that `halfstep init` writes, and to one that says more.
KINDS = [
    ({"kind": "weight_only", "group": 128}, hs.Recipe.weight_only(4, 128)),
    ({"kind": "weight_only", "weights": 8}, hs.Recipe.weight_only(8, 128)),
    ({"kind": "dynamic", "group": 32}, hs.Recipe.dynamic(8, 32)),
    ({"kind": "static", "activations": 6}, hs.Recipe.uniform(8, 6)),
]


@pytest.mark.parametrize(("flags", "wanted"), KINDS)
@pytest.mark.parametrize(
    "recipe", ["", "recipe: {kind: weight_only, weights: 3, group: 64, float_layers: [fc]}\n"]
)
def test_a_flag_for_another_kind_replaces_what_belongs_to_the_files(tmp_path, flags, wanted, recipe):
    path = tmp_path / "halfstep.yaml"
    text = commented("a.b:c", "test.npz", "train.npz", ["fc"])
    path.write_text(text.replace("recipe:\n", recipe) if recipe else text)
    if recipe and flags["kind"] == "weight_only":  # the same kind: the file's own keys stay
        wanted = hs.Recipe.weight_only(flags.get("weights", 3), flags.get("group", 64))
    config = config_from(str(path), {}, {"weights": None, **flags}, {})
    assert Job(config, nn.Identity(), [], None).recipe() == (
        wanted.override("fc", None) if recipe else wanted
    )


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ArgumentError, match=r"nowhere.yaml: No such file or directory"):
        read_config(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ArgumentError, match=r"binary.yaml: is no text"):
        read_config(tmp_path / "binary.yaml")


def test_nothing_is_constructed_from_a_tag(tmp_path):
    (tmp_path / "evil.yaml").write_text("model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ArgumentError, match=r"evil.yaml, line 1: no YAML: could not determine a constructor"):
        read_config(tmp_path / "evil.yaml")


def test_flags_have_no_lines():
    with pytest.raises(ArgumentError, match=r"^command line: threads is 0, needed greater than 0"):
        make_config({"model": "a:b", "labelled": "c", "calibration": "d", "threads": 0}, "command line")


def test_the_commented_file_is_a_configuration_with_every_key():
    text = commented("a.b:c", "test.npz", "train.npz", ["conv1", "fc"])
    config = Config.model_validate(yaml.safe_load(text))
    assert config == Config(model="a.b:c", labelled="test.npz", calibration="train.npz")
    assert all(f"{name}:" in text for name in Config.model_fields)


SEVERAL = """\
model: a.b:c
labelled: test.npz
calibration: train.npz
metric:
  accuracy: accuracy
  night: scores:at_night
max_drop:
  accuracy: 0.01
  night: 0.05
"""


def test_several_metrics_by_name(tmp_path):
    path = tmp_path / "several.yaml"
    path.write_text(SEVERAL)
    config = read_config(path)
    assert config.metric == {"accuracy": "accuracy", "night": "scores:at_night"}
    assert config.max_drop == {"accuracy": 0.01, "night": 0.05}
    path.write_text(SEVERAL.replace("night: 0.05", "night: -1"))
    with pytest.raises(
        ArgumentError, match=r"line 9: max_drop.night is -1, needed greater than or equal to 0"
    ):
        read_config(path)
    path.write_text(GOOD + "max_drop: much\n")
    with pytest.raises(ArgumentError, match=r"line 10: max_drop is 'much', needed a number, without"):
        read_config(path)
