"""hs.train: what it learns, what it keeps, and that a broken run goes on as if it had not broken."""

import copy
import itertools
import math
import os
from contextlib import closing

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import halfstep as hs
from halfstep.errors import ArgumentError, DataError, DivergedError, NotObservedError, RunError, TrainingError
from halfstep.fake_quantize import Mode
from halfstep.files import lock
from halfstep.training.checkpoint import FILE
from halfstep.training.distillation import Distillation
from halfstep.training.fit import fit, learning_rate
from halfstep.training.trained import Judgement
from tests.training.networks import Killing, calibrated, task, trained_net

HELD_OUT = hs.Accuracy(task(512, 256, seed=1))
FIXED = hs.Ranges(weights="fixed", activations="fixed", codebooks=False)


@pytest.fixture(scope="module")
def net():
    return trained_net()


@pytest.fixture(scope="module")
def prepared(net):
    return calibrated(net, weights=2, activations=3)


@pytest.fixture
def low(prepared):
    """The network in 2 and 3 bits, which costs it most of its accuracy."""
    return copy.deepcopy(prepared)


def options(**changes):
    return hs.Training(
        **{"labelled": task(), "loss": cross_entropy, "learning_rate": 1e-2, "epochs": 2} | changes
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_wins_back_what_quantization_lost(net, low):
    with low.using(Mode.FLOAT):
        before = HELD_OUT.evaluate(low).value
    quantized = HELD_OUT.evaluate(low).value
    trained = hs.train(low, options(), HELD_OUT)
    assert trained.steps == trained.planned == len(trained.losses) == 16
    assert [mark.step for mark in trained.marks] == [0, 4, 8, 12, 16]
    after = HELD_OUT.evaluate(low).value
    assert after == max(mark.score for mark in trained.marks)
    assert after > (quantized + before) / 2


def test_the_users_module_is_left_alone(net, low):
    before = state(net)
    hs.train(low, options(epochs=0.25))
    assert equal(state(net), before)


def test_fixed_ranges_stay_and_float_layers_stay_float(net):
    q = calibrated(net, 4, 4)
    q.float_layers = ["fc"]
    ranges = {name: site.range() for name, site in q.sites.items()}
    weight = q.weight("conv2.weight").clone()
    trained = hs.train(q, options(ranges=FIXED, epochs=1, distillation=None))
    assert trained.best_step == 8
    assert q.float_layers == {"fc"}
    assert not torch.equal(q.weight("conv2.weight"), weight)
    for name, (low, high) in ranges.items():
        assert torch.equal(q.sites[name].range()[0], low)
        assert torch.equal(q.sites[name].range()[1], high)


def test_the_best_state_is_kept_even_if_it_is_the_start(low):
    scores = itertools.chain([1.0, 1.0], itertools.count(start=0, step=-1))  # the float model is scored twice
    before = state(low)
    trained = hs.train(low, options(epochs=1), lambda model: next(scores))
    assert trained.best_step == 0
    assert equal(state(low), before)


def test_it_stops_at_the_target(low):
    scores = iter([1.0, 1.0, 0.2, 0.5, 0.995, 1.0])  # float twice, the start, and three marks
    trained = hs.train(low, options(), lambda model: next(scores), max_drop=0.01)
    assert trained.steps == trained.best_step == 8
    assert [mark.score for mark in trained.marks] == [0.2, 0.5, 0.995]


def test_the_learning_rate_falls_along_a_cosine():
    training = options(final_rate=0.01)
    assert training.rate(0, 100) == 1.0
    assert training.rate(50, 100) == pytest.approx(0.505)
    assert training.rate(100, 100) == pytest.approx(0.01)
    assert training.rate(25, 100) == pytest.approx(0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize(
    ("weights", "activations", "optimizer", "wanted"),
    [
        (8, 8, "adamw", 1e-4),
        (4, 8, "adamw", 2e-3),
        (8, 3, "adamw", 2e-3),
        (6, 8, "adamw", 1e-4 * 20**0.5),
        (2, 8, "sgd", 2e-2),
    ],
)
def test_a_learning_rate_left_out_follows_from_the_fewest_bits(net, weights, activations, optimizer, wanted):
    q = calibrated(net, weights, activations)
    trained = hs.train(q, options(learning_rate=None, optimizer=optimizer, epochs=0.125))
    assert trained.learning_rate == pytest.approx(wanted)
    assert hs.train(q, options(epochs=0.125)).learning_rate == 1e-2


def test_layers_in_float_do_not_count_for_the_learning_rate(net):
    q = calibrated(
        net, recipe=hs.Recipe.int8().override("fc", hs.LayerSpec(hs.TensorSpec(2), hs.TensorSpec(8)))
    )
    assert learning_rate(options(learning_rate=None), q) == pytest.approx(2e-3)
    q.float_layers = ["fc"]
    assert learning_rate(options(learning_rate=None), q) == pytest.approx(1e-4)


def test_the_control_has_the_same_learning_rate(low):
    with low.using(Mode.FLOAT):
        assert learning_rate(options(learning_rate=None), low) == pytest.approx(2e-3)


def test_distillation_is_the_tempered_divergence():
    teacher, ours = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    p, q = (torch.softmax(logits.double() / 3, 1) for logits in (teacher, ours))
    wanted = 0.5 * 9 * (p * (p / q).log()).sum(1).mean()
    assert Distillation(weight=0.5, temperature=3.0).loss(ours, teacher).item() == pytest.approx(
        wanted.item()
    )
    maps = Distillation(axis=1).loss(ours.T[None, :, :, None], teacher.T[None, :, :, None])
    assert maps.item() == pytest.approx(Distillation().loss(ours, teacher).item())


def test_distillation_alone_needs_no_labels(low):
    with low.using(Mode.FLOAT), torch.no_grad():
        wanted = torch.cat([low(images) for images, _ in task(64)])

    def distance(q):
        with torch.no_grad():
            return float((torch.cat([q(images) for images, _ in task(64)]) - wanted).square().mean())

    before = distance(low)
    classes = hs.Distillation(axis=1)
    hs.train(low, options(labelled=[(images, None) for images, _ in task()], loss=None, distillation=classes))
    assert distance(low) < 0.75 * before


def test_the_float_control_is_trained_in_the_same_way(net, low):
    with low.using(Mode.FLOAT):
        before = HELD_OUT.evaluate(low).value
    trained = hs.train(low, options(epochs=1, control=True), HELD_OUT)
    assert trained.control is not None
    assert trained.control >= before - 0.05
    assert hs.train(calibrated(net), options(epochs=0.125)).control is None


@pytest.mark.parametrize("changes", [{"optimizer": "sgd"}, {"autocast": torch.bfloat16}, {"clip_norm": 0.5}])
def test_other_options_train_too(low, changes):
    trained = hs.train(low, options(**changes))
    assert sum(trained.losses[-4:]) < sum(trained.losses[:4])


def scaled(factor):
    return lambda outputs, labels: factor * cross_entropy(outputs, labels)


def test_gradients_that_float16_cannot_hold_train_all_the_same(net):
    def moved(autocast):
        q = calibrated(net, 4, 4)
        before = q.weight("conv1.weight").detach().clone()
        # Its gradients are around 1e-9; float16 ends at 6e-8.
        changes = {"loss": scaled(1e-6), "distillation": None, "optimizer": "sgd", "learning_rate": 1e4}
        trained = hs.train(q, options(**changes, autocast=autocast, epochs=0.5))
        assert trained.skipped == 0
        return (q.weight("conv1.weight").detach() - before).flatten()

    wanted = moved(None)
    assert float(wanted.norm()) > 0
    assert float(torch.cosine_similarity(moved(torch.float16), wanted, dim=0)) > 0.99


def test_steps_beyond_float16_are_skipped_until_the_loss_fits(low):
    trained = hs.train(low, options(autocast=torch.float16, loss=scaled(30.0), clip_norm=1.0))
    assert 0 < trained.skipped < 8
    assert trained.steps == len(trained.losses) == 16
    assert len(set(trained.losses)) > 8
    assert trained.to_dict()["skipped"] == trained.skipped
    assert all(bool(tensor.isfinite().all()) for tensor in low.parameters())


def test_a_gradient_that_is_never_finite_ends_a_training_in_float16_too(low):
    def loss(outputs, labels):
        return cross_entropy(outputs, labels) + (outputs.sum() * 0).sqrt()

    message = r"step 17 of 32: .* the gradient of 'fc\..*' went first\..* try autocast=torch.bfloat16, which has room"
    with pytest.raises(DivergedError, match=message):
        hs.train(low, options(loss=loss, autocast=torch.float16, epochs=4))


class Augmented:
    """Batches that draw from every global random state, shuffled anew each epoch."""

    def __len__(self):
        return 8

    def __iter__(self):
        batches = task()
        for index in torch.randperm(8).tolist():
            images, labels = batches[index]
            yield images + 0.1 * torch.randn_like(images), labels


class KilledError(Exception):
    pass


#: Its gradients overflow until the loss is scaled less.
OVERFLOWING = {"autocast": torch.float16, "distillation": hs.Distillation(weight=50.0), "clip_norm": 1.0}


@pytest.mark.parametrize(
    ("killed_at", "changes"), [(2, {}), (5, {}), (11, {}), (15, {}), (4, OVERFLOWING), (13, OVERFLOWING)]
)
def test_a_killed_run_goes_on_with_the_same_result(low, tmp_path, killed_at, changes):
    def run(loss, directory):
        q = copy.deepcopy(low)
        training = options(labelled=Augmented(), loss=loss, checkpoint_every=3, **changes)
        try:
            return q, hs.train(q, training, HELD_OUT, directory=directory)
        except KeyboardInterrupt:
            return q, None

    whole, trained = run(Killing(), tmp_path / "whole")
    _, killed = run(Killing(killed_at), tmp_path / "broken")
    assert killed is None
    resumed, again = run(Killing(), tmp_path / "broken")
    assert equal(state(resumed), state(whole))
    assert again.losses == trained.losses
    assert again.skipped == trained.skipped
    assert (trained.skipped > 0) == bool(changes)
    assert [mark.score for mark in again.marks] == [mark.score for mark in trained.marks]
    assert again.resumed_at == killed_at // 3 * 3


def test_a_finished_run_is_not_trained_again(low, tmp_path):
    q = copy.deepcopy(low)
    first = hs.train(q, options(epochs=0.5, loss=Killing()), directory=tmp_path)
    again = copy.deepcopy(low)
    second = hs.train(again, options(epochs=0.5, loss=Killing(0)), directory=tmp_path)
    assert second.losses == first.losses
    assert equal(state(again), state(q))


def test_a_checkpoint_of_another_training_is_refused(low, net, tmp_path):
    hs.train(copy.deepcopy(low), options(epochs=0.25), directory=tmp_path)
    other = r"checkpoint of another training: its network, ranges, options, loss or data differ"
    flipped = [(inputs, labels.flip(0)) for inputs, labels in task()]
    for changes in ({"learning_rate": 1e-3}, {"loss": Killing()}, {"labelled": flipped}):
        with pytest.raises(RunError, match=other):
            hs.train(copy.deepcopy(low), options(epochs=0.25, **changes), directory=tmp_path)
    with pytest.raises(RunError, match=r"checkpoint of another training"):
        hs.train(calibrated(net), options(epochs=0.25), directory=tmp_path)
    with pytest.raises(RunError, match=r"directory .*below cannot be written: Not a directory"):
        hs.train(copy.deepcopy(low), options(epochs=0.25), directory=tmp_path / FILE / "below")


def test_a_checkpoint_cut_short_is_followed_by_the_one_before(low, tmp_path):
    def run(loss, directory=tmp_path):
        q = copy.deepcopy(low)
        return q, hs.train(q, options(loss=loss, checkpoint_every=3), HELD_OUT, directory=directory)

    whole, trained = run(Killing(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Killing(11))
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:1000])
    with pytest.warns(
        UserWarning, match=r"cannot read .*training.safetensors.*going on from the checkpoint before it"
    ):
        resumed, again = run(Killing())
    assert again.resumed_at == 6
    assert equal(state(resumed), state(whole)) and again.losses == trained.losses
    for file in (FILE, "training.before.safetensors"):
        (tmp_path / file).write_bytes(b"broken")
    with pytest.raises(
        RunError, match=r"cannot read .*training.safetensors.*; delete it to train from the start"
    ):
        run(Killing())


def test_every_checkpoint_is_on_the_disk_before_it_gets_its_name(low, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), fsync(file)))
    hs.train(low, options(epochs=0.5, checkpoint_every=1), directory=tmp_path)
    assert len(synced) == 2 * 4  # the file, then its name


def test_two_trainings_in_one_directory_are_refused(low, tmp_path):
    with closing(lock(tmp_path)), pytest.raises(RunError, match="is in use by another process"):
        hs.train(low, options(epochs=0.25), directory=tmp_path)


def test_data_that_come_otherwise_are_told(low, tmp_path):
    generator = torch.Generator()  # not seeded again for the run that goes on

    def run(loss):
        inputs, labels = (torch.cat(parts) for parts in zip(*task(), strict=True))
        data = torch.utils.data.TensorDataset(inputs, labels)
        loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, generator=generator)
        q = copy.deepcopy(low)
        return hs.train(q, options(labelled=loader, loss=loss, checkpoint_every=3), directory=tmp_path)

    with pytest.raises(KeyboardInterrupt):
        run(Killing(5))
    with pytest.warns(UserWarning, match="training data: they come otherwise than before the interruption"):
        assert run(Killing()).resumed_at == 3


def test_a_training_that_is_stopped_is_scored_and_goes_on(low, tmp_path):
    def run(steps):
        q, asked = copy.deepcopy(low), itertools.count()
        seen = []

        def judge(step):
            seen.append(step)
            score = HELD_OUT.evaluate(q)
            return Judgement(score.value, -score.value, enough=False)

        return q, fit(q, options(), judge, tmp_path, lambda: next(asked) >= steps), seen

    stopped, trained, seen = run(6)
    assert (trained.steps, seen) == (6, [0, 4, 6])
    assert trained.best_step in seen
    whole, trained, seen = run(100)
    assert (trained.resumed_at, trained.steps, seen) == (6, 16, [8, 12, 16])
    assert not equal(state(whole), state(stopped))


def test_the_callers_random_state_is_untouched(low):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    hs.train(low, options(labelled=Augmented(), epochs=0.25))
    assert torch.equal(torch.rand(3), wanted)


# bad input


def poisoned(step):
    batches = task()
    images, labels = batches[step]
    return [*batches[:step], (images * float("nan"), labels), *batches[step + 1 :]]


def test_a_batch_of_nan_stops_the_training(low):
    before = state(low)
    with pytest.raises(
        DivergedError,
        match=r"training batch 3: step 4 of 16: the loss became nan; the batch's inputs are not finite\. The model is "
        r"back at step 0\. Lower learning_rate \(now 0\.01\) or set clip_norm \(now None\)",
    ):
        hs.train(low, options(labelled=poisoned(3)))
    assert equal(state(low), before)


def test_the_last_good_checkpoint_is_kept(low):
    q = copy.deepcopy(low)
    hs.train(q, options(labelled=task()[:2], epochs=1, learning_rate=1e-2, final_rate=1.0))
    with pytest.raises(DivergedError, match=r"step 4 of 8: .* back at step 2"):
        hs.train(low, options(labelled=poisoned(3), epochs=1, final_rate=1.0, checkpoint_every=2))
    assert torch.equal(low.weight("fc.weight"), q.weight("fc.weight"))


def test_the_site_that_went_first_is_named(low):
    with torch.no_grad():
        low.weight("conv2.bias")[0] = float("inf")
    with pytest.raises(DivergedError, match=r"the loss became nan; the values at site '.*' went first"):
        hs.train(low, options())


def test_the_gradient_that_went_first_is_named(low):
    def loss(outputs, labels):
        return cross_entropy(outputs, labels) + (outputs.sum() * 0).sqrt()

    with pytest.raises(DivergedError, match=r"but the gradient of 'fc\.(bias|weight)' went first"):
        hs.train(low, options(loss=loss))


def test_a_range_that_overflows_is_named(low):
    with pytest.raises(DivergedError, match=r"scale: got .*; the range of site '.*' went first"):
        hs.train(low, options(ranges=hs.Ranges(after=0, rate=1e6)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labelled": None}, DataError, r"got NoneType, needed an iterable of \(inputs, labels\) pairs"),
        ({"labelled": []}, DataError, r"got no batch, needed at least one \(inputs, labels\) pair"),
        ({"labelled": (batch for batch in [])}, DataError, r"got no batch"),
        (
            {"labelled": [torch.zeros(2, 1, 8, 8)]},
            DataError,
            r"batch 0: got Tensor, needed a pair \(inputs, labels\)",
        ),
        ({"labelled": [(torch.zeros(2, 1, 8, 8), None)]}, DataError, r"batch 0: its labels are None"),
        (
            {"labelled": [(torch.zeros(2, 1, 8, 9), torch.zeros(2))]},
            DataError,
            r"batch 0: input 'x': got shape",
        ),
        (
            {"loss": lambda o, y: o.detach().sum()},
            TrainingError,
            r"does not depend on the outputs, or detaches them",
        ),
        ({"loss": lambda o, y: 3.0}, TrainingError, r"gave float, needed a tensor of one number"),
        (
            {"loss": lambda o, y: o.sum(1)},
            TrainingError,
            r"gave shape \(32,\), needed a tensor of one number",
        ),
        ({"loss": lambda o, y: 1 / 0}, TrainingError, r"training batch 0: loss.* raised ZeroDivisionError"),
        (
            {"loss": lambda o, y: torch.ones((), requires_grad=True) * 2, "distillation": None},
            TrainingError,
            r"does not depend on the outputs: it has no gradient by any of them",
        ),
        (  # beside distillation too, which would train all the same
            {"loss": lambda o, y: torch.ones((), requires_grad=True) * 2},
            TrainingError,
            r"training batch 0: loss.* does not depend on the outputs: it has no gradient by any of them",
        ),
    ],
)
def test_data_and_losses_that_cannot_be_used(low, changes, error, message):
    with pytest.raises(error, match=message):
        hs.train(low, options(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": None, "distillation": None}, r"got neither a loss nor distillation"),
        ({"optimizer": "lion"}, r"optimizer is 'lion', needed one of 'adamw', 'sgd'"),
        ({"epochs": 0}, r"epochs is 0, needed a number above 0"),
        ({"learning_rate": math.nan}, r"learning_rate is nan"),
        ({"final_rate": 2}, r"final_rate is 2, needed 0 to 1"),
        ({"clip_norm": -1.0}, r"clip_norm is -1.0"),
        ({"autocast": "bfloat16"}, r"autocast is 'bfloat16', needed torch.bfloat16, torch.float16 or None"),
    ],
)
def test_options_that_cannot_be(changes, message):
    with pytest.raises(TrainingError, match=message):
        options(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hs.Ranges(weights="free"), r"weights is 'free', needed one of 'learned', 'follow', 'fixed'"),
        (
            lambda: hs.Ranges(activations="follow"),
            r"activations is 'follow', needed one of 'learned', 'fixed'",
        ),
        (lambda: hs.Ranges(after=2), r"after is 2, needed 0 to 1"),
        (lambda: hs.Ranges(rate=0), r"rate is 0, needed a number above 0"),
        (lambda: hs.Distillation(temperature=0), r"temperature is 0, needed a number above 0"),
    ],
)
def test_options_of_the_parts_that_cannot_be(make, message):
    with pytest.raises(TrainingError, match=message):
        make()


def test_a_generator_is_kept_for_every_epoch(low):
    assert hs.train(low, options(labelled=iter(task()))).steps == 16


class Streamed(torch.utils.data.IterableDataset):
    """Data whose loader has a length that raises."""

    def __iter__(self):
        return iter(task())


def test_data_that_do_not_know_their_length_are_counted(low):
    loader = torch.utils.data.DataLoader(Streamed(), batch_size=None)
    assert hs.train(low, options(labelled=loader, epochs=1)).steps == 8


class Once:
    """Data that can be iterated only once, but hides it."""

    def __init__(self):
        self.items = iter(task())

    def __len__(self):
        return 8

    def __iter__(self):
        return self.items


def test_data_that_run_dry_are_told(low):
    with pytest.raises(
        DataError, match=r"got 0 batches in epoch 2, needed 8; give data that can be iterated again"
    ):
        hs.train(low, options(labelled=Once()))


def test_models_that_cannot_be_trained(net, low):
    fresh = hs.prepare(net, torch.zeros(2, 1, 8, 8))
    with pytest.raises(NotObservedError, match=r"6 of 6 sites have no range"):
        hs.train(fresh, options())
    frozen = copy.deepcopy(net).requires_grad_(False)
    with pytest.raises(TrainingError, match=r"no trainable parameter: every one has requires_grad=False"):
        hs.train(calibrated(frozen), options())
    low.float_layers = ["*"]
    with pytest.raises(TrainingError, match=r"nothing is quantized: every layer is in float"):
        hs.train(low, options())
    with pytest.raises(TrainingError, match=r"training: got list, needed hs.Training\(labelled, loss\)"):
        hs.train(low, task())
    with pytest.raises(ArgumentError, match=r"max_drop: needs a metric"):
        hs.train(low, options(), max_drop=0.1)
    with pytest.raises(ArgumentError, match=r"control: needs a metric"):
        hs.train(low, options(control=True))
    assert isinstance(net, nn.Module)
