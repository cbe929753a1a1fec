"""Partial quantization: the fewest layers, the evidence, the pins, and what cannot be done."""

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.demo import DigitsNet
from halfstep.errors import ArgumentError, MetricError, NotObservedError, RecipeError, RunError
from halfstep.evaluate import EarlyStopping, Score, share_of_error
from halfstep.fidelity.compare import compare
from halfstep.journal import Journal
from halfstep.ladder.costs import Tuning, microseconds
from halfstep.ladder.float_score import float_evaluation
from halfstep.ladder.goal import Goal
from halfstep.ladder.partial import climb_partial
from halfstep.ladder.search import Search
from halfstep.ladder.sensitivity import ADVICE, Halves
from halfstep.precision import groups_of
from halfstep.runtime.deployed import DeployedModel, inspect_kernels
from tests.ladder.networks import FAULTS, INPUTS, Attention, calibrated, faulty, labelled, weights_per_tensor


@pytest.fixture(scope="module")
def accuracy():
    return hs.Accuracy(labelled(faulty()))


@pytest.fixture
def model():
    return weights_per_tensor()


def test_the_planted_faults_and_nothing_else_are_put_back(model, accuracy):
    result = hs.partial(model, accuracy, max_drop=0.06)
    assert result.met and set(result.float_layers) == set(FAULTS) == set(model.float_layers)
    assert result.score == accuracy.evaluate(model).value
    assert result.drop.low < result.drop.value < result.drop.high
    assert result.drop.value == pytest.approx(result.float_score - result.score)
    assert result.full_evaluations < 6 and result.saved > 0
    assert str(result).startswith("met: drop")


def test_nothing_can_be_taken_from_the_result(model, accuracy):
    result = hs.partial(model, accuracy, max_drop=0.025)
    goal = Goal(0.025, accuracy.evaluate(faulty()))
    assert result.met and len(result.float_layers) > 2
    for name in result.float_layers:
        model.float_layers = set(result.float_layers) - {name}
        assert not goal.met(accuracy.evaluate(model))


@pytest.mark.parametrize("max_drop", [0.06, 0.025, 0.015])
def test_as_few_as_one_by_one_on_the_true_drops_within_one(accuracy, max_drop):
    slow = hs.Partial(method="metric", walk="one_by_one", prune=False, early=False)
    exhaustive = hs.partial(weights_per_tensor(), accuracy, max_drop, slow)
    quick = hs.partial(weights_per_tensor(), accuracy, max_drop)
    assert quick.met and exhaustive.met
    assert len(quick.float_layers) <= len(exhaustive.float_layers) + 1
    assert quick.full_evaluations < exhaustive.full_evaluations


def test_with_every_layer_in_float_nothing_is_met(model, accuracy):
    result = hs.partial(model, accuracy, max_drop=0.0)
    assert not result.met and result.drop.value > 0
    quantized = set(model.layer_names) - set(result.float_layers)
    assert len(quantized) == 1 and result.score == accuracy.evaluate(model).value
    last = result.sensitivity.rows[-1].group.name
    assert quantized == {last}
    assert f"With every group but {last} in float it scores {result.score:.4f}" in result.decisions[-1]
    assert f"With {last} in float too nothing would be quantized" in result.decisions[-1]


def test_a_network_of_one_layer_is_left_quantized():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 3))
    model = calibrated(network, hs.Recipe.uniform(3, 3, ends=None))
    result = hs.partial(model, hs.Accuracy(labelled(network)), max_drop=0.0)
    assert not result.met and result.float_layers == () and result.drop.value > 0
    assert "does not meet the target. With 0 in float too nothing" in result.decisions[-1]


def test_more_float_layers_than_quantized_ones_are_called_by_their_name(accuracy):
    few = hs.partial(weights_per_tensor(), accuracy, 0.06)
    assert len(few.float_layers) == 2 and not any("More than half" in said for said in few.decisions)
    many = hs.partial(weights_per_tensor(), accuracy, 0.015)
    assert many.met and len(many.float_layers) > 3 and any("More than half" in s for s in many.decisions)


def test_targets_are_those_of_quantize(accuracy):
    float_score = accuracy.evaluate(faulty()).value
    found = [
        hs.partial(weights_per_tensor(), accuracy, **target)
        for target in (
            {"max_drop": 0.06},
            {"relative_drop": 0.06 / float_score},
            {"floor": float_score - 0.06},
        )
    ]
    assert all(result.met for result in found)
    assert len({(result.score, result.float_layers) for result in found}) == 1
    with pytest.raises(ArgumentError, match=r"target: got max_drop and floor, needed one of"):
        hs.partial(weights_per_tensor(), accuracy, 0.06, floor=0.5)
    with pytest.raises(ArgumentError, match=r"the float model itself scores 1, needed at least 1.5"):
        hs.partial(weights_per_tensor(), accuracy, floor=1.5)


def test_a_search_with_a_directory_goes_on_where_it_was_interrupted(accuracy, tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    run, runs = EarlyStopping.run, []

    def counted(self, *args, **options):
        runs.append(1)
        if len(runs) == 3:
            raise Interrupted
        return run(self, *args, **options)

    monkeypatch.setattr(EarlyStopping, "run", counted)
    with pytest.raises(Interrupted):
        hs.partial(weights_per_tensor(), accuracy, 0.025, directory=tmp_path)
    judged = len(runs)
    result = hs.partial(weights_per_tensor(), accuracy, 0.025, directory=tmp_path)
    again = len(runs) - judged
    whole = hs.partial(weights_per_tensor(), accuracy, 0.025)
    assert (result.float_layers, result.score) == (whole.float_layers, whole.score)
    assert [made.what for made in result.history] == [made.what for made in whole.history]
    assert again == len(runs) - judged - again - 2  # two verdicts were there already
    assert result.full_evaluations == whole.full_evaluations
    with pytest.raises(RunError, match="belongs to a run with another configuration"):
        hs.partial(weights_per_tensor(), accuracy, 0.03, directory=tmp_path)


def test_a_model_that_meets_the_target_is_left_alone(model, accuracy):
    result = hs.partial(model, accuracy, max_drop=0.99)
    assert result.met and result.float_layers == () and len(result.history) == 3
    assert "put no layer back: the target is met as it is" in result.decisions[-1]


def test_float_layers_are_float_in_the_file_too(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(64, 1, 8, 8)
    network = DigitsNet().eval()
    with torch.no_grad():  # one filter of block2.conv1 outweighs the others, which a single range then loses
        network.block2.conv1.weight[0] *= 200
    model = calibrated(network, hs.Recipe.uniform(5, 8, hs.PerTensor()), images)
    with torch.no_grad():
        wanted = network(images)
    error = hs.CallableMetric(lambda m: (m(images) - wanted).abs().mean(), higher_is_better=False)
    spared = hs.partial(model, error, max_drop=0.3 * error.evaluate(model).value)
    assert spared.met and 0 < len(spared.float_layers) < 10
    file = hs.export_onnx(model, tmp_path / "model.onnx")
    kernels = inspect_kernels(file)
    integer = {name.split("/")[0] for name in kernels.integer}
    assert integer & set(model.layer_names) == set(model.layer_names) - set(spared.float_layers)
    assert len(kernels.floating) == len(spared.float_layers)
    parity = compare(model, DeployedModel(file), [images])
    assert parity.sqnr > 25


def test_ranges_at_run_time_are_a_step_before_float():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model = calibrated(network, inputs=INPUTS / 40)  # calibrated on inputs that are far too small
    accuracy = hs.Accuracy(labelled(network))
    result = hs.partial(model, accuracy, 0.03, hs.Partial(steps=("float", "dynamic")))
    assert result.met and result.put_back and set(result.put_back.values()) == {"dynamic"}
    assert set(model.dynamic_layers) == set(result.put_back) and not model.float_layers
    assert "with ranges at run time" in result.decisions[-2]


def test_activations_of_16_bits_are_a_step_before_float(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    accuracy = hs.Accuracy(labelled(network))
    model = calibrated(network, hs.Recipe.uniform(8, 3, ends=None))
    result = hs.partial(model, accuracy, 0.03, hs.Partial(steps=("float", "int16")))
    assert result.met and set(result.put_back.values()) == {"int16"}
    assert model.int16_layers == set(result.put_back) and not model.float_layers
    assert any("onnxruntime has no kernels for 16-bit activations" in said for said in result.decisions)
    file = hs.export_onnx(model, tmp_path / "model.onnx")
    assert accuracy.evaluate(DeployedModel(file)).value == pytest.approx(result.score, abs=0.005)


def test_a_step_that_the_target_lacks_is_left_out_and_said_so():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    model = hs.prepare(network, INPUTS[:2], hs.Recipe.uniform(8, 3, ends=None), target="tensorrt")
    hs.observe(model, [INPUTS[:200]])
    hs.calibrate(model)
    result = hs.partial(model, hs.Accuracy(labelled(network)), 0.05, hs.Partial(steps=("int16", "float")))
    assert "int16" not in result.put_back.values()
    assert any("Step 'int16' is left out: tensorrt" in said for said in result.decisions)


def test_a_step_is_taken_by_single_layers_where_it_does_not_do_for_all():
    torch.manual_seed(0)
    network = DigitsNet().eval()
    images = torch.rand(300, 1, 8, 8)
    model = calibrated(network, inputs=images / 20)
    with torch.no_grad():
        wanted = network(images)
    error = hs.CallableMetric(lambda m: (m(images) - wanted).abs().mean(), higher_is_better=False)
    result = hs.partial(
        model, error, 0.2 * error.evaluate(model).value, hs.Partial(steps=("dynamic", "float"))
    )
    # Convs have no kernel for ranges at run time; the one linear layer has.
    assert result.met and result.put_back.get("fc", "dynamic") == "dynamic" and len(result.float_layers) > 1


def race_by_size(model, choices, threads):
    """As if every float layer took a tenth of a millisecond more."""
    return [1000 + 100 * len(chosen["float"]) for chosen in choices]


@pytest.fixture
def clock(monkeypatch):
    """Times of groups in float by name, of whole files by the number of float layers; nothing is worth joining."""
    times = {"0": 0.0, "2": 500.0, "4": 10.0, "6": 10.0, "8": 10.0, "10": -3.0}
    monkeypatch.setattr(
        "halfstep.ladder.costs.microseconds",
        lambda model, groups, threads: [times[g.name] for g in groups],
    )
    monkeypatch.setattr("halfstep.ladder.costs.race_choices", race_by_size)
    monkeypatch.setattr(
        "halfstep.ladder.costs.tune", lambda model, threads, among: Tuning((), 0.0, len(among))
    )
    return times


def test_layers_that_cost_much_time_in_float_come_later(accuracy, clock):
    model = weights_per_tensor()
    plain = {row.group.name: row.score for row in hs.sensitivity(model).rows}
    result = hs.partial(model, accuracy, 0.06, hs.Partial(order="latency"))
    order = [row.group.name for row in result.sensitivity.rows]
    assert set(order[:2]) == {"0", "10"}  # they cost nothing
    assert order[2:] == sorted(order[2:], key=lambda name: -plain[name] / clock[name])
    assert result.met and "over the time that float costs" in result.decisions[0]
    assert "+500 us in float" in str(result.sensitivity)


def test_a_layer_that_is_needed_is_put_back_whatever_its_time(accuracy, clock):
    clock["2"] = 1e6
    model = weights_per_tensor()
    result = hs.partial(model, accuracy, 0.06, hs.Partial(order="latency"))
    assert result.sensitivity.rows[-1].group.name == "2"  # last in the order of time
    assert result.met and set(result.float_layers) == set(FAULTS)
    said = "A batch takes 1200 us so, 1000 us quantized throughout, 1600 us in float."
    assert any(said in sentence for sentence in result.decisions)


def test_the_faster_of_both_orders_is_taken(accuracy, clock, monkeypatch):
    times = dict(clock)
    model = weights_per_tensor()
    by_accuracy = set(hs.partial(weights_per_tensor(), accuracy, 0.015).float_layers)
    monkeypatch.setattr(
        "halfstep.ladder.costs.race_choices",
        lambda model, choices, threads: [sum(times[name] for name in chosen["float"]) for chosen in choices],
    )
    result = hs.partial(model, accuracy, 0.015, hs.Partial(order="latency"))
    assert result.met
    assert sum(times[name] for name in result.float_layers) <= sum(times[name] for name in by_accuracy)


def test_layers_between_float_ones_join_them_where_that_is_faster(accuracy, clock, monkeypatch):
    offered = []

    def joining(model, threads, among):
        offered.extend(among)
        model.float_layers = model.float_layers | {"4"}
        return Tuning(("4",), 5.0, len(among))

    monkeypatch.setattr("halfstep.ladder.costs.tune", joining)
    model = weights_per_tensor()
    result = hs.partial(model, accuracy, 0.06, hs.Partial(order="latency"))
    assert result.met and set(result.float_layers) == {*FAULTS, "4"} == set(model.float_layers)
    assert result.score == accuracy.evaluate(model).value
    assert len(offered) == 3 and not set(offered) & set(FAULTS)  # one layer stays quantized
    assert any("left in float for speed: 4 (5 us less a batch)" in said for said in result.decisions)


def test_the_fastest_is_what_the_search_hands_on_even_with_more_layers_in_float(accuracy, clock, monkeypatch):
    def joining(model, threads, among):
        model.float_layers = model.float_layers | {"4"}
        return Tuning(("4",), 5.0, len(among))

    monkeypatch.setattr("halfstep.ladder.costs.tune", joining)
    model = weights_per_tensor()
    score, made = float_evaluation(accuracy, model)
    search = Search(model, accuracy, Goal(0.06, score), made)
    found = climb_partial(search, hs.Partial(order="latency"))
    assert search.best.score.value == found.value
    assert search.best.snapshot.precision["float"] == {*FAULTS, "4"}


def test_a_float_network_that_is_as_fast_is_said_to_be(accuracy, clock, monkeypatch):
    monkeypatch.setattr(
        "halfstep.ladder.costs.race_choices", lambda model, choices, threads: [1000.0 for _ in choices]
    )
    result = hs.partial(weights_per_tensor(), accuracy, 0.06, hs.Partial(order="latency"))
    assert any("Float is as fast on this machine" in sentence for sentence in result.decisions)


def test_a_resumed_search_goes_by_the_times_that_were_measured_first(accuracy, clock, tmp_path):
    options = hs.Partial(order="latency")
    first = hs.partial(weights_per_tensor(), accuracy, 0.06, options, directory=tmp_path)
    clock.update({"2": 1.0, "8": 900.0})
    again = hs.partial(weights_per_tensor(), accuracy, 0.06, options, directory=tmp_path)
    assert again.sensitivity.rows == first.sensitivity.rows
    assert len(again.history) == len(first.history)


def test_time_in_float_is_measured_on_the_runtime(monkeypatch):
    outputs = {}

    def raced(contestants, rounds, warmup, leave):
        outputs.update({name: run() for name, run in contestants.items()})
        times = [2.0, 2.04, 4.0, 2.02]  # quantized, its twin, and one file for each group
        return {name: [time] * 7 for name, time in zip(contestants, times, strict=True)}

    monkeypatch.setattr("halfstep.ladder.heats.in_turns", raced)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    model = calibrated(network)
    groups = groups_of(model)
    # Twice as long as 2.02 ms, the mean of the twins, and a difference within the 0.04 ms between them.
    assert microseconds(model, groups) == pytest.approx([1980, 0])
    assert microseconds(model, groups, least=0.9) == pytest.approx([1980, 0])
    assert microseconds(model, groups, least=1.0) == [0, 0]
    for index, group in enumerate(groups):
        model.float_layers = group.layers
        assert torch.allclose(outputs[str(index + 2)], model(INPUTS[:128]), atol=1e-2)
    assert not torch.equal(outputs["0"], outputs["2"]) and torch.equal(outputs["0"], outputs["1"])
    with pytest.raises(NotObservedError, match=r"latency: no example was kept to time"):
        microseconds(hs.prepare(network, INPUTS[:2]), groups)


def test_which_half_loses_it(accuracy):
    weights = calibrated(faulty(), hs.Recipe.uniform(6, 8, hs.PerTensor()))
    result = hs.partial(weights, accuracy, max_drop=0.05)
    assert result.halves.cause in ("weights", "both") and result.halves.weights > 0.05
    assert "With only the weights quantized the drop is" in result.decisions[0]
    both = calibrated(faulty(), hs.Recipe.uniform(8, 3))
    assert hs.partial(both, accuracy, max_drop=0.05).halves.cause == "activations"
    assert hs.partial(weights_per_tensor(), accuracy, max_drop=0.06).halves is None  # there is no other half


@pytest.mark.parametrize(
    ("weights", "activations", "allowed", "cause"),
    [
        (0.06, 0.01, 0.05, "weights"),
        (0.01, 0.06, 0.05, "activations"),
        (0.06, 0.06, 0.05, "both"),
        (0.04, 0.04, 0.05, "neither"),
        (0.01, -0.01, -0.02, "weights"),  # held to more than float, since files lose more
        (0.0, -0.01, -0.02, "nothing"),
    ],
)
def test_the_half_that_loses_most_is_the_cause(weights, activations, allowed, cause):
    found = Halves(weights, activations, weights + activations, allowed)
    assert found.cause == cause and str(found).endswith(ADVICE[cause])


def test_pins(model, accuracy):
    options = hs.Partial(keep_float=("0",), keep_quantized=("6",))
    result = hs.partial(model, accuracy, 0.06, options)
    assert "0" in result.float_layers and "6" not in result.float_layers
    assert not result.met  # one of the faults may not be put back
    assert "does not meet the target" in result.decisions[-1]
    assert result.score > accuracy.evaluate(weights_per_tensor()).value


def test_pins_that_suffice(model, accuracy):
    result = hs.partial(model, accuracy, 0.06, hs.Partial(keep_float=FAULTS))
    assert result.met and set(result.float_layers) == set(FAULTS) and result.sensitivity is None


def test_tied_layers_are_put_back_together():
    torch.manual_seed(0)
    network = Attention()
    attention = calibrated(network, hs.Recipe.uniform(3, 8, hs.PerTensor()))
    result = hs.partial(attention, hs.Accuracy(labelled(network)), 0.0, hs.Partial(keep_float=("key",)))
    assert {"query", "key", "value"} <= set(result.float_layers)
    attention.float_layers = []
    with pytest.raises(RecipeError, match=r"layer 'query' is pinned quantized, but reads the same quantizer"):
        hs.partial(
            attention, hs.Accuracy([]), 0.0, hs.Partial(keep_float=("key",), keep_quantized=("query",))
        )


def test_lower_is_better(model):
    with torch.no_grad():
        targets = faulty()(INPUTS)
    batches = list(zip(INPUTS.split(100), targets.split(100), strict=True))
    error = hs.Metric(batches, lambda o, y: (o - y).square().mean(1), higher_is_better=False)
    start = error.evaluate(model).value
    result = hs.partial(model, error, max_drop=start / 20)
    assert result.met and 0 <= result.score <= start / 20 and set(FAULTS) <= set(result.float_layers)
    assert result.drop.method == "bootstrap" and "no known bounds" in result.decisions[-1]


def test_a_strict_goal_puts_back_more(accuracy):
    loose = hs.partial(weights_per_tensor(), accuracy, max_drop=0.03)
    strict = hs.partial(weights_per_tensor(), accuracy, max_drop=0.03, strict=True)
    assert strict.met and strict.drop.high <= 0.03
    assert len(strict.float_layers) >= len(loose.float_layers)


def test_an_early_verdict_that_all_examples_overturn_is_not_the_end(model, accuracy, monkeypatch):
    score, made = float_evaluation(accuracy, model)
    search = Search(model, accuracy, Goal(0.06, score), made)
    run, lies = search._stopper.run, []

    def lying(candidate, *args, **options):
        scores, side = run(candidate, *args, **options)
        if candidate.float_layers == {"6"} and not lies:
            lies.append(side)
            return scores[:100], "below"
        return scores, side

    monkeypatch.setattr(search._stopper, "run", lying)
    found = climb_partial(search, hs.Partial(early=True))
    assert lies == ["above"] and search.goal.met(found)
    assert any("All examples overturn the early verdict" in sentence for sentence in search.decisions)


def doubting(search, monkeypatch, refused):
    """Early verdicts refuse these sets of float layers after 100 examples, unless the refusal is to be final."""
    run, loose = search._stopper.run, pytest.approx(1 - search.goal.confidence)

    def doubtful(candidate, max_drop, level, **options):
        scores, side = run(candidate, max_drop, level, **options)
        if level == loose and refused(candidate.float_layers):
            return scores[:100], "above"
        return scores, side

    monkeypatch.setattr(search._stopper, "run", doubtful)


def test_nothing_is_given_up_before_more_examples_confirm_that_it_does_not_hold(model, accuracy, monkeypatch):
    score, made = float_evaluation(accuracy, model)
    search = Search(model, accuracy, Goal(0.06, score), made)
    doubting(search, monkeypatch, lambda layers: len(layers) > 0)
    found = climb_partial(search)
    assert search.goal.met(found) and set(FAULTS) <= model.float_layers
    assert any("More examples overturn the early verdict on every group but" in s for s in search.decisions)


def test_each_early_refusal_is_confirmed_where_everything_in_float_is_not_enough(
    model, accuracy, monkeypatch
):
    score, made = float_evaluation(accuracy, model)
    search = Search(model, accuracy, Goal(0.06, score), made)
    doubting(search, monkeypatch, lambda layers: len(layers) > 0)
    everything = 5  # of six layers
    evaluate = search.scorer.evaluate
    worst = Score.mean(torch.zeros(len(INPUTS), dtype=torch.float64))
    monkeypatch.setattr(
        search.scorer, "evaluate", lambda m: worst if len(m.float_layers) == everything else evaluate(m)
    )
    finish = search._stopper.finish
    monkeypatch.setattr(
        search._stopper,
        "finish",
        lambda m, scores: worst if len(m.float_layers) == everything else finish(m, scores),
    )
    found = climb_partial(search)
    assert search.goal.met(found) and len(model.float_layers) < everything
    assert any("More examples overturn the early verdict on the " in s for s in search.decisions)


def test_refusing_clear_cases_for_good_takes_few_examples(model, accuracy):
    score, made = float_evaluation(accuracy, model)
    search = Search(model, accuracy, Goal(0.0, score), made)
    start = search.memory.replayed_cost
    climb_partial(search)
    assert "does not meet the target" in search.decisions[-1]
    # The start and the most in float are scored whole; the refusals are clear cases, and confirmed with few examples,
    # of which the later shares of the error take more.
    assert 2 <= search.memory.replayed_cost - start < 2.75


def test_a_step_is_left_out_at_its_share_of_the_error(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    accuracy = hs.Accuracy(labelled(network))
    model = calibrated(network, hs.Recipe.uniform(3, 8, ends=None))  # 16 bits do not help the weights
    score, made = float_evaluation(accuracy, model)
    search = Search(model, accuracy, Goal(0.02, score), made)
    run, levels = EarlyStopping.run, {}

    def noted(self, candidate, max_drop, level, **options):
        levels.setdefault((frozenset(candidate.int16_layers), frozenset(candidate.float_layers)), level)
        return run(self, candidate, max_drop, level, **options)

    monkeypatch.setattr(EarlyStopping, "run", noted)
    climb_partial(search, hs.Partial(steps=("int16", "float")))
    assert not model.int16_layers and len(model.float_layers) > 0
    asked = {layers: level for (layers, floats), level in levels.items() if layers and not floats}
    assert asked == {frozenset(model.layer_names): pytest.approx(share_of_error(0.05, 2))}


def test_nothing_is_scored_twice(model, accuracy):
    score, made = float_evaluation(accuracy, model)
    search = Search(model, accuracy, Goal(0.025, score), made)
    first = climb_partial(search)
    spent, decided = len(search.evaluations), model.float_layers
    model.float_layers = []
    assert climb_partial(search).value == first.value and model.float_layers == decided
    assert len(search.evaluations) == spent


def test_a_resumed_search_scores_nothing_twice_either(accuracy, tmp_path):
    made, decided = [], []
    for _ in range(2):
        model = weights_per_tensor()  # as in another process: nothing but the directory is shared
        with Journal(tmp_path) as journal:
            score, _ = float_evaluation(accuracy, model, journal)
            search = Search(model, accuracy, Goal(0.025, score), journal=journal)
            climb_partial(search)
        made.append([(entry.what, entry.score) for entry in search.evaluations])
        decided.append(model.float_layers)
    assert made[0] == made[1] and decided[0] == decided[1] and len(decided[0]) > 2


def test_what_partial_cannot_do(model, accuracy):
    with pytest.raises(RecipeError, match=r"pattern 'layer9' matches no layer; the nearest names are"):
        hs.partial(model, accuracy, options=hs.Partial(keep_float=("layer9",)))
    with pytest.raises(RecipeError, match=r"layer '2' is pinned both in float and quantized"):
        hs.partial(model, accuracy, options=hs.Partial(keep_float=("2",), keep_quantized=("2",)))
    with pytest.raises(
        ArgumentError, match=r"no layers are left to put back to float: all that are quantized"
    ):
        hs.partial(model, accuracy, options=hs.Partial(keep_quantized=("*",)))
    with pytest.raises(ArgumentError, match=r"walk: got 'random', needed one of 'gallop', 'one_by_one'"):
        hs.Partial(walk="random")
    with pytest.raises(ArgumentError, match=r"order: got 'size', needed 'accuracy' or 'latency'"):
        hs.Partial(order="size")
    with pytest.raises(ArgumentError, match=r"steps: got 'int4', needed some of"):
        hs.Partial(steps=("int4",))
    with pytest.raises(ArgumentError, match=r"steps: got none"):
        hs.Partial(steps=())
    with pytest.raises(MetricError, match=r"a strict goal needs the scores of single examples"):
        hs.partial(model, lambda m: 1.0, strict=True)
    with pytest.raises(RecipeError, match=r"keep_float: '\*' pins every quantized layer in float"):
        hs.partial(model, accuracy, options=hs.Partial(keep_float=("*",)))
    model.float_layers = model.layer_names
    with pytest.raises(ArgumentError, match=r"no layers are left to put back to float: none is quantized"):
        hs.partial(model, accuracy)


@pytest.mark.parametrize("name", ["residual", "attention", "linear"])
def test_every_single_layer_can_be_the_only_one_or_the_only_one_not(name):
    torch.manual_seed(0)
    networks = {
        "residual": (DigitsNet().eval(), torch.rand(32, 1, 8, 8)),
        "attention": (Attention(), INPUTS[:32]),
        "linear": (nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), INPUTS[:32]),
    }
    network, inputs = networks[name]
    model = calibrated(network, inputs=inputs)
    everything = set(model.layer_names)
    for group in groups_of(model):
        for names in (everything - set(group.layers), set(group.layers)):
            model.float_layers = names
            assert all(site.calibrated for site in model.sites.values())
        model.float_layers = []


def test_wider_weights_are_a_step_before_float(model, accuracy):
    result = hs.partial(model, accuracy, max_drop=0.06, options=hs.Partial(steps=("bits8", "float")))
    assert result.met and "bits8" in set(result.put_back.values()) <= {"bits8", "float"}
    assert model.bits8_layers | model.float_layers == set(result.put_back) >= set(FAULTS)
    assert all(model.sites[f"{name}.weight"].format.bits == 8 for name in model.bits8_layers)
    assert any("with 8-bit weights" in sentence for sentence in result.decisions)
