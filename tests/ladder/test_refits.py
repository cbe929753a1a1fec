"""What repairs learned holds for the layers that it was learned for: with others it is fitted anew, or dropped."""

import copy

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.evaluate import Score
from halfstep.fake_quantize import Mode
from halfstep.graph.layer_precision import LayerPrecision
from halfstep.journal import Journal
from halfstep.ladder import repairs
from halfstep.ladder.goal import Goal
from halfstep.ladder.partial import climb_partial, evaluations_at_most
from halfstep.ladder.repairs import Refits, refit, repair
from halfstep.ladder.search import Search
from halfstep.repair.record import Repair, Treated
from halfstep.snapshot import Snapshot, fingerprint

IMAGES = torch.randn(96, 3, 6, 6, generator=torch.Generator().manual_seed(1)) + 0.5
#: Layers in float: behind what they leave quantized, before it, and on both sides of it.
FLOATS = [("0", "2", "4"), ("2", "4"), ("0", "2"), ("2",), ("0", "4")]


def network():
    torch.manual_seed(0)
    convs = [layer for ins in (3, 8, 8) for layer in (nn.Conv2d(ins, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*convs, nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@pytest.fixture(scope="module")
def plain():
    q = hs.prepare(network(), IMAGES[:4], hs.Recipe.uniform(2, 8))
    hs.observe(q, [IMAGES[:64]])
    hs.calibrate(q, hs.MSE())
    return q


REPAIRS = {
    "roundings": lambda q: repair(q, [hs.gptq]),
    "bias shifts": hs.correct_bias,
    "both": lambda q: repair(q, [hs.gptq, hs.learn_rounding, hs.correct_bias]),
}


@pytest.fixture(scope="module", params=REPAIRS)
def repaired_once(request, plain):
    q = copy.deepcopy(plain)
    REPAIRS[request.param](q)
    return q


@pytest.fixture
def repaired(repaired_once):
    return copy.deepcopy(repaired_once)


@pytest.fixture
def both(plain):
    q = copy.deepcopy(plain)
    hs.gptq(q)
    hs.correct_bias(q)
    return q


def sqnr(q):
    """Signal to noise of the outputs, in dB."""
    with torch.no_grad():
        wanted = network()(IMAGES)
        return float(10 * torch.log10(wanted.square().sum() / (q(IMAGES) - wanted).square().sum()))


@pytest.mark.parametrize("names", FLOATS)
def test_repaired_and_then_partly_float_is_no_worse_than_never_repaired(plain, repaired, names):
    before = copy.deepcopy(plain)
    before.float_layers = repaired.float_layers = names
    assert sqnr(repaired) > sqnr(before)


def test_what_is_in_force_behind_other_layers_is_not_what_was_learned(repaired):
    learned = {name: place.learned() for name, place in repaired.compensations.find().items()}
    repaired.choose(LayerPrecision.of(float={"2"}))
    now = {name: place.learned() for name, place in repaired.compensations.find().items()}
    assert now["0"].same(learned["0"])  # nothing changed before it
    assert now["4"].empty and now["6"].empty
    assert repaired.compensations.missing == {"4", "6"}


def test_layers_behind_the_one_that_changed_are_not_touched(repaired):
    learned = {name: place.learned() for name, place in repaired.compensations.find().items()}
    repaired.float_layers = ["6"]
    assert not repaired.compensations.missing
    for name, place in repaired.compensations.find().items():
        assert place.learned().same(learned[name])


@pytest.mark.parametrize("attribute", ["float_layers", "int16_layers", "dynamic_layers", "bits4_layers"])
def test_what_was_learned_comes_back_exactly(repaired, attribute):
    before = fingerprint(repaired)
    for names in (["2"], ["0", "4"], ["2", "6"], ["4"], ["0"]):
        setattr(repaired, attribute, names)
        assert (fingerprint(repaired) == before) == (not getattr(repaired, attribute))
    setattr(repaired, attribute, [])
    assert fingerprint(repaired) == before


def test_inputs_of_16_bits_are_other_inputs(repaired):
    repaired.choose(LayerPrecision.of(int16={"4"}))
    assert {"4", "6"} <= repaired.compensations.missing
    assert "0" not in repaired.compensations.missing


def test_a_copy_knows_what_was_learned(both):
    before, twin = fingerprint(both), copy.deepcopy(both)
    both.float_layers = ["2"]
    other = copy.deepcopy(both)
    for q in (both, other):
        q.float_layers = []
        assert fingerprint(q) == before
    twin.float_layers = ["2"]
    twin.float_layers = []
    assert fingerprint(twin) == before


def test_what_was_fitted_anew_comes_back_too_for_a_while(both, monkeypatch):
    both.float_layers = ["2"]
    anew = fingerprint(both)
    both.float_layers = []
    monkeypatch.setattr(repairs, "refit_layers", lambda *_: pytest.fail("fitted before"))
    both.float_layers = ["2"]
    assert fingerprint(both) == anew


def test_new_ranges_end_what_was_learned_for_the_old_ones(both):
    both.float_layers = ["2"]
    hs.calibrate(both, hs.Max(), hs.Max())
    both.float_layers = []
    assert all(place.learned().offset is None for place in both.compensations.find().values())


def test_a_loaded_state_is_what_is_wanted(both, monkeypatch):
    snapshot = Snapshot.of(both)
    both.float_layers = ["2"]
    other = Snapshot.of(both)
    names = [fingerprint(each.restore()) for each in (snapshot, other, snapshot)]
    assert names[0] == names[2] != names[1]
    monkeypatch.setattr(repairs, "refit_layers", lambda *_: pytest.fail("it has all it needs"))
    other.restore().fit_anew()


def harm(model, batches):
    """A refit that makes everything worse."""
    for name in model.compensations.missing:
        model.shifts[name].shift.fill_(100.0)
    return Repair("harm", "nothing", tuple(Treated(name, 0.0, 0.0) for name in model.compensations.missing))


def test_a_refit_that_measures_worse_is_dropped(plain, both, monkeypatch):
    monkeypatch.setattr(repairs, "refit_layers", harm)
    both.choose(LayerPrecision.of(float={"2"}))
    dropped = fingerprint(both)
    done = refit(both)
    assert not done.kept and done.after.kl > done.before.kl
    assert str(done).startswith("what repairs had learned was dropped in 2 layers behind those put back: KL")
    assert fingerprint(both) == dropped and not both.compensations.missing


def test_a_refit_that_fails_leaves_what_it_found(both, monkeypatch):
    def failing(model, batches):
        harm(model, batches)
        raise RuntimeError("stopped")

    monkeypatch.setattr(repairs, "refit_layers", failing)
    both.choose(LayerPrecision.of(float={"2"}))
    dropped = fingerprint(both)
    with pytest.raises(RuntimeError, match="stopped"):
        both.fit_anew()
    assert fingerprint(both) == dropped and both.compensations.missing == {"4", "6"}


def test_the_mode_is_as_before(both):
    with both.using(Mode.FLOAT):
        both.float_layers = ["2"]
        assert both.mode is Mode.FLOAT


def test_a_model_that_keeps_no_example_drops_what_was_learned(plain, both):
    plain = copy.deepcopy(plain)
    both.sample = []
    both.float_layers = plain.float_layers = ["0"]
    assert both.compensations.missing == {"2", "4", "6"}
    assert sqnr(both) == sqnr(plain)


def test_a_ranking_looks_at_layers_without_what_was_learned(plain, both):
    before = fingerprint(both)
    for method in ("kl", "spared_sqnr", "fisher"):
        rows = hs.sensitivity(both, method).rows
        assert [(row.layers, row.score) for row in rows] == [
            (row.layers, row.score) for row in hs.sensitivity(plain, method).rows
        ]
    assert fingerprint(both) == before


def error():
    """The outputs' noise over their signal, of which less is better; the float network has none."""
    wanted = network()(IMAGES).detach()
    return hs.CallableMetric(
        lambda m: float((m(IMAGES) - wanted).norm() / wanted.norm()), higher_is_better=False
    )


def test_partial_quantization_of_a_repaired_network_puts_no_more_layers_back(plain, both):
    options = hs.Partial(keep_quantized=("6",))
    before = hs.partial(copy.deepcopy(plain), error(), 0.01, options)
    result = hs.partial(both, error(), 0.01, options)
    assert before.met and result.met and len(result.float_layers) <= len(before.float_layers)
    assert result.score == error().evaluate(both).value


def test_partial_quantization_says_what_became_of_the_repairs(both):
    result = hs.partial(both, error(), 0.5, hs.Partial(keep_float=("0",)))
    assert result.float_layers == ("0",)
    said = "What repairs had learned was fitted anew in 3 layers behind those put back: KL"
    assert result.decisions[-1].startswith(said)


def test_refits_cost_no_evaluation(both):
    search = searching(both)
    bound = evaluations_at_most(search)
    climb_partial(search)
    assert search.refits.seconds > 0 and 0 < search.memory.replayed_cost <= bound


def searching(q, folder=None):
    return Search(q, error(), Goal(0.01, Score(0.0), higher_is_better=False), journal=Journal(folder))


def test_a_resumed_search_tries_the_very_same_networks(both, tmp_path, monkeypatch):
    twin, choices = copy.deepcopy(both), LayerPrecision.of(float={"2"})
    first = searching(both, tmp_path)
    first.choose(choices)
    wanted = fingerprint(both)
    first.journal.close()
    monkeypatch.setattr(repairs, "refit", lambda *_: pytest.fail("fitted before"))
    again = searching(twin, tmp_path)
    again.choose(choices)
    assert fingerprint(twin) == wanted
    assert again.refits.sentence() == first.refits.sentence() != ""
    again.journal.close()


def test_without_a_directory_the_networks_are_the_same(both, tmp_path):
    twin = copy.deepcopy(both)
    for q, folder in ((both, tmp_path), (twin, None)):
        search = searching(q, folder)
        search.choose(LayerPrecision.of(float={"2"}))
        search.journal.close()
    assert fingerprint(both) == fingerprint(twin)


def test_once_the_time_is_up_what_was_learned_is_dropped(plain, both, monkeypatch):
    plain = copy.deepcopy(plain)
    monkeypatch.setattr(repairs, "REFIT_SECONDS", 0.0)
    search = searching(both)
    search.choose(LayerPrecision.of(float={"0"}))
    plain.float_layers = ["0"]
    assert sqnr(both) == sqnr(plain) and search.refits.sentence() == ""


def test_a_training_takes_up_what_was_learned(both):
    labels = network()(IMAGES).argmax(1)
    with torch.no_grad():
        before = both(IMAGES)
    hs.train(both, hs.Training([(IMAGES, labels)], nn.functional.cross_entropy, learning_rate=1e-12))
    assert all(place.learned().empty for place in both.compensations.find().values())
    with torch.no_grad():
        torch.testing.assert_close(both(IMAGES), before, atol=0.1 * float(before.abs().max()), rtol=0)
    both.float_layers = ["2"]
    assert not both.compensations.missing


def test_refits_need_something_that_was_learned(plain):
    q = copy.deepcopy(plain)
    q.choose(LayerPrecision.of(float={"2"}))
    assert refit(q) is None
    Refits(q, searching(q).checkpoints)()
