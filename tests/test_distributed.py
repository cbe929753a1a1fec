"""A run on several ranks is the run of one process: the same statistics, scores and decisions, to the last bit."""

import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.calibration.shards import _state
from halfstep.distributed import Share, crew, in_turns, keep, share, together
from halfstep.distributed.watch import BROKEN, SEARCH, SILENCE
from halfstep.errors import TrainingError
from halfstep.evaluate import as_scorers, early_stopping
from halfstep.fidelity.compare import Reference
from halfstep.fidelity.reference import knowing_float
from halfstep.journal import read
from halfstep.ladder.beginning import _observed
from halfstep.ladder.qat import _float_twin
from halfstep.ladder.ranks import agree, follow, hand_out
from halfstep.progress import listening
from halfstep.runtime.deployed import DeployedModel
from halfstep.training.averaging import _rows
from halfstep.training.fit import fit

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["halfstep", "halfstep.ladder.quantize", "torch._dynamo"])


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def network():
    """With batch norm, and rows of other sizes than the rest."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 4),
    )  # fmt: skip
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(normal([7, place], *parameter.shape) / 3)
        model[1].running_mean.copy_(normal(8, 6) / 5)
    return model.eval()


INPUTS = normal(1, 150, 1, 8, 8)
BATCHES = list(normal(2, 7 * 12, 1, 8, 8).split(12))  # no number of ranks divides them


def labelled(size=16):
    with torch.no_grad():
        labels = network()(INPUTS).argmax(1)
    return list(zip(INPUTS.split(size), labels.split(size), strict=True))


def hits(outputs, labels):
    hit = outputs.argmax(1) == labels
    return torch.stack([hit, ~hit], 1).double()


def training(**options):
    return hs.Training(labelled(15), nn.functional.cross_entropy, epochs=1, learning_rate=1e-3, **options)


# processes


def _enter(rank, size, folder, seconds, work, args):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{size}", rank=rank, world_size=size,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    try:
        answer = work(rank, *args)
    except hs.HalfstepError as error:
        answer = f"{type(error).__name__}: {error}"
    torch.save(answer, f"{folder}/{size}.{rank}.pt")
    torch.distributed.destroy_process_group()


def on_ranks(folder, size, work, *args, seconds=60, dead=()):
    """What ``work(rank, *args)`` answers on each rank, an error as its words; None of those that die."""
    folder.mkdir(exist_ok=True)
    processes = [
        PROCESSES.Process(target=_enter, args=(rank, size, folder, seconds, work, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [
            -signal.SIGKILL if rank in dead else 0 for rank in range(size)
        ]
    finally:
        for process in processes:
            process.kill()
    return [
        None if rank in dead else torch.load(folder / f"{size}.{rank}.pt", weights_only=False)
        for rank in range(size)
    ]


def own_process(work, *args):
    """The same in this process, with as many threads as ranks have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work(0, *args)
    finally:
        torch.set_num_threads(threads)


# all that is shared


def pieces(rank):
    """Every kind of work that ranks share, and what rank 0 has of it."""
    data, model = labelled(), network()
    metrics = {
        "hits": hs.Accuracy(data),
        "set": hs.SetMetric(data, hits, lambda rows: float(rows[:, 0].mean())),
        "function": functools.partial(_weights, 1.0),
        "near": hs.Cosine([inputs for inputs, _ in data]),
    }
    asked, found = training(), {}
    with crew() as ranks:
        q = hs.prepare(model, INPUTS[:4], recipe=hs.Recipe.uniform(4, 4))
        scorer = as_scorers(metrics)
        if not ranks.leads:
            return follow(ranks, q, scorer, BATCHES, asked)
        scorer = knowing_float(scorer, q)
        agree(ranks, q, scorer, BATCHES, asked)
        examples, unsteady = together(_observed, q, BATCHES)
        found["examples"], found["unsteady"] = examples.digest(), str(unsteady)
        found |= _state(q)
        found["sample"] = torch.cat(q.sample)
        found["sweep"] = str(hs.calibrate(q, hs.best_of(by="sqnr")))
        score = scorer.evaluate(q)
        found["scores"] = [score.value, *(other.value for other in score.others.values())]
        found["hits"] = score.per_example
        hit = scorer.metrics["hits"]
        with q.using(hs.model.Mode.FLOAT):
            stopper = early_stopping(hit, hit.evaluate(q))
        found["early"], found["side"] = stopper.run(q, -0.2, 0.05)
        found["finished"] = stopper.finish(q, found["early"]).per_example
        for method in ("kl", "spared_sqnr"):
            table = hs.sensitivity(q, method)
            found[method] = str([(row.layers, row.score) for row in table.rows]), table.examples
        scales = {name: site.scale.clone() for name, site in q.sites.items()}
        done = fit(q, asked, lambda step: _judged(scorer, q, step))
        found["losses"], found["trained"] = torch.tensor(done.losses), dict(q.named_parameters())
        found["moved"] = [not torch.equal(scales[name], site.scale) for name, site in q.sites.items()]
        return ranks.end(found)


def _weights(factor, model):
    return factor * float(sum(parameter.double().abs().sum() for parameter in model.parameters()))


def _judged(scorer, q, step):
    from halfstep.training.trained import Judgement

    return Judgement(scorer.evaluate(q).value, -step, False)  # the last is the best


@pytest.fixture(scope="module")
def alone():
    return own_process(pieces)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_have_what_one_process_has(alone, tmp_path, size):
    answers = on_ranks(tmp_path, size, pieces)
    assert answers[0].keys() == alone.keys()
    for name, value in alone.items():
        got = answers[0][name]
        if name == "losses":  # sums of parts round otherwise
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
        elif name == "trained":
            for part, tensor in value.items():
                torch.testing.assert_close(got[part], tensor, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, name
    assert len(alone["early"]) < len(INPUTS) == len(alone["finished"])
    assert any(alone["moved"])
    for other in answers[1:]:  # parameters stay equal on all ranks, and they hear what rank 0 ends with
        assert all(
            torch.equal(other["trained"][part], answers[0]["trained"][part]) for part in other["trained"]
        )


# a climb


def climb(rank, folder, calibration=None, rungs=("ptq", "partial"), asked=None, **options):
    settings = {
        "metric": hs.Accuracy(labelled()),
        "recipe": hs.Recipe.uniform(3, 4),
        "max_drop": 0.02,
        "threads": 1,
        "calibration": BATCHES if calibration is None else calibration,
        "training": asked,
        **options,
    }
    outcome = hs.quantize(network(), INPUTS[:4], directory=folder, rungs=rungs, **settings)
    decisions = [re.sub(r"[\d.,e-]+ (s|min|us)\b", "_", sentence) for sentence in outcome.decisions]
    history = [(made.what, made.score, made.examples) for made in outcome.history]
    ranges = {name: (site.scale, site.zero_point) for name, site in outcome.model.sites.items()}
    return outcome.met, outcome.float_layers, outcome.deployed_score, decisions, history, str(ranges)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_same_recipe_is_chosen(tmp_path, size):
    whole = own_process(climb, tmp_path / "one")
    answers = on_ranks(tmp_path / "many", size, climb, tmp_path / "many/run")
    assert answers == [whole] * size
    assert sorted(path.name for path in (tmp_path / "many/run").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


# a rank that dies


class Deadly(list):
    """Batches on which the last rank is killed."""

    def __iter__(self):
        for place, batch in enumerate(super().__iter__()):
            if place == 4 and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def killed_in_calibration(rank, folder):
    return climb(rank, folder, Deadly(BATCHES), ("ptq",))


def killed_early(rank, folder):
    return given(rank, calibration=Deadly(BATCHES))


COMPARE = Reference.compared_batches


def deadly_compare(*args):
    if share().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return COMPARE(*args)


def killed_in_the_sweep(rank, folder):
    Reference.compared_batches = deadly_compare
    return climb(rank, folder, rungs=("ptq",))


def dying_loss(outputs, labels):
    loss = nn.functional.cross_entropy(outputs, labels)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1 and float(labels[0]) == 1.0:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


def climb_to_training(rank, folder):
    asked = hs.Training(labelled(15), dying_loss, epochs=1, learning_rate=1e-3)
    few = hs.Recipe.uniform(2, 3)
    return climb(rank, folder, rungs=("ptq", "qat"), asked=asked, max_drop=0.0, recipe=few)


@pytest.mark.parametrize(
    "work",
    [
        killed_early,
        pytest.param(killed_in_calibration, marks=pytest.mark.slow),
        pytest.param(killed_in_the_sweep, marks=pytest.mark.slow),
        pytest.param(climb_to_training, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_killed_is_named_and_the_journal_goes_on(tmp_path, work):
    assert BROKEN + SEARCH < SILENCE + SEARCH < 60  # seconds until a rank is known to be lost
    answers = on_ranks(tmp_path / "broken", 3, work, tmp_path / "run", dead=(1,))
    for rank in (0, 2):
        assert re.search(
            r"RankError: rank 1 of 3 \(process \d+ on .*\) gave no sign of life .* killed", answers[rank]
        )
        assert "the journal goes on from here, with any number of ranks" in answers[rank]
    if work is killed_early:  # the others take their time
        return
    assert read(tmp_path / "run")
    again = climb_to_training if work is climb_to_training else functools.partial(climb, rungs=("ptq",))
    resumed, whole = own_process(again, tmp_path / "run"), own_process(again, tmp_path / "whole")
    if work is climb_to_training:  # whose last bits depend on how many ranks there were
        assert resumed[:2] == whole[:2]
        assert resumed[2] == pytest.approx(whole[2], abs=0.03)  # a few of 150 images
    else:
        assert resumed == whole


# what goes wrong


def other_weights(rank):
    model = network()
    if rank == 1:
        with torch.no_grad():
            model[3].weight[0, 0, 0, 0] += 1e-3
    return given(rank, model)


def given(rank, model=None, calibration=None, metric=None, asked=None, q=None):
    """As far as the statistics, and a training."""
    with crew() as ranks:
        q = q or hs.prepare(model or network(), INPUTS[:4])
        scorer, calibration = as_scorers(metric or hs.Accuracy(labelled())), calibration or BATCHES
        if not ranks.leads:
            return follow(ranks, q, scorer, calibration, asked)
        agree(ranks, q, scorer, calibration, asked)
        together(_observed, q, calibration)
        hs.calibrate(q)
        if asked is not None:
            fit(q, asked)
        return ranks.end("well")


def test_what_is_given_must_be_the_same(tmp_path):
    words = (
        "RankError: rank 1: its model is another than rank 0's: 1 of 6 tensors differ, the first is '3.weight'; load "
        "the same weights on every rank"
    )
    assert on_ranks(tmp_path, 2, other_weights) == [words, words]


def failing_loss(outputs, labels):
    if torch.distributed.get_rank() == 1:
        raise ValueError("no such label")
    return nn.functional.cross_entropy(outputs, labels)


class Counted:
    """Batches whose content cannot be compared."""

    def __init__(self, batches, count):
        self.batches, self.count = batches, count

    def __getstate__(self):
        return {}

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(self.batches[: self.count])


def several_faults(rank):
    """In one group: a run that fails leaves it as it was."""
    answers, q = [], hs.prepare(network(), INPUTS[:4])
    for fault in (
        {"calibration": BATCHES[: 5 if rank else 7]},
        {"calibration": iter([]) if rank else BATCHES},
        {"calibration": BATCHES[::-1] if rank else BATCHES},
        {"metric": hs.Accuracy(labelled()[:: -1 if rank else 1])},
        {"calibration": [*BATCHES[:3], BATCHES[3] * float("nan")]},
        {"asked": hs.Training(Counted(labelled(15), 2 + rank), nn.functional.cross_entropy)},
        {"asked": hs.Training(labelled(15), failing_loss)},
        {},
    ):
        try:
            answers.append(given(rank, q=q, **fault))
        except hs.HalfstepError as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


def test_data_that_differ_between_ranks(tmp_path):
    first, second = on_ranks(tmp_path, 2, several_faults)
    assert first == second
    cure = "give every rank the same data, all of them"
    assert first[:2] == [
        f"RankError: rank 1: batches of calibration data: {count}, on rank 0 7; {cure}" for count in (5, 0)
    ]
    assert re.fullmatch(
        r"RankError: rank 1: calibration data \w{8}, on rank 0 \w{8}; give every rank the same data in the same order",
        first[2],
    )
    assert re.match(r"RankError: rank 1: its labelled data \(150 examples, \w+\) is another than", first[3])
    assert re.match(r"DataError: rank 1: calibration batch 3: site .* values are NaN", first[4])
    assert first[5] == f"RankError: rank 1: batches of training data: 3, on rank 0 2; {cure}"
    assert first[6] == (
        "TrainingError: rank 1: training batch 0: loss(outputs, labels) raised ValueError: no such label"
    )
    assert first[7] == "well"


def absent(rank):
    if rank:
        time.sleep(3)
        return None
    return given(rank)


def test_a_rank_that_does_not_come(tmp_path):
    answers = on_ranks(tmp_path, 2, absent, seconds=1)
    assert answers[0] == (
        "RankError: rank 1 of 2 did not come to the same call within 1 s, the timeout of the process group; every rank "
        "makes the same calls of halfstep"
    )


def stuck(rank):
    with crew() as ranks:
        if not ranks.leads:
            return ranks.serve()
        ranks.end(list(in_turns(_sleeping, range(4))))
    return None


def _sleeping(index, item):
    if torch.distributed.get_rank() == 1:
        time.sleep(4)
    return item


def test_a_rank_that_hangs(tmp_path):
    answers = on_ranks(tmp_path, 2, stuck, seconds=1)
    assert re.match(
        r"RankError: rank 1 gives signs of life, but did not come to 'scores' within 1 s, the timeout of the process "
        r"group: look where it waits",
        answers[0],
    )


def asked_of_all(rank, folder):
    """What a function of a user's may do that asks all ranks, of whatever it is given; and what cannot be sent."""
    own = labelled()[rank::2]

    def everyone_counts(model):  # a closure: every rank has its own
        right = sum(hits(model(inputs), labels)[:, 0].sum() for inputs, labels in own)
        torch.distributed.all_reduce(right)
        return float(right) / len(INPUTS)

    def closure(index, item):
        return index, torch.distributed.get_rank()

    asked, found = training(), {}
    with crew() as ranks:
        q = hs.prepare(network(), INPUTS[:4])
        scorer = as_scorers(everyone_counts)
        if not ranks.leads:
            return follow(ranks, q, scorer, BATCHES, asked)
        agree(ranks, q, scorer, BATCHES, asked)
        together(_observed, q, BATCHES)
        hs.calibrate(q)
        deployed = DeployedModel(
            hs.export_onnx(q, folder / "m.onnx"), q.captured.in_spec, q.captured.out_spec, 1
        )
        hand_out(deployed, [])
        found["file"], found["wanted"] = (
            scorer.evaluate(deployed).value,
            hs.Accuracy(labelled()).evaluate(deployed).value,
        )
        twin = _float_twin(q)
        keep(twin, q, by=_float_twin)
        fit(twin, asked)
        found["twin"] = scorer.evaluate(twin).value
        said = Said()
        with warnings.catch_warnings(record=True) as warned, listening(said):
            warnings.simplefilter("always")
            for _ in range(2):
                found["alone"] = list(in_turns(closure, "ab"))
            found["here"] = together(_parameters, network())
        found["warned"], found["said"] = [str(each.message) for each in warned], said.sentences
        return ranks.end(found)


def _parameters(model):
    return share().size, len(list(model.parameters()))


class Said:
    """A progress listener that keeps what is found out."""

    def __init__(self):
        self.sentences = []

    def start(self, what, total):
        return None

    def advance(self, task, steps):
        return None

    def end(self, task):
        return None

    def say(self, sentence):
        self.sentences.append(sentence)


def test_every_rank_is_asked_for_files_and_controls_and_nothing_stays_with_rank_0_in_silence(tmp_path):
    found, other = on_ranks(tmp_path, 2, asked_of_all, tmp_path)
    assert found == other
    assert found["file"] == found["wanted"] > 0.5
    assert found["twin"] > 0.5
    assert found["alone"] == [(0, 0), (1, 0)] and found["here"] == (1, 8)
    (warning,) = found["warned"]
    assert re.match(
        r"test_distributed\.asked_of_all\.<locals>\.closure: rank 0 works alone on it, since it cannot be sent to the "
        r"other ranks \(.*\); give functions and classes that a module defines by name",
        warning,
    )
    assert found["said"] == ["Rank 0 works alone on what needs a Sequential, which the other ranks have not"]


def test_labels_are_divided_by_example():
    assert _rows({"class": torch.arange(4)}, 1, 3, 4, 2)["class"].tolist() == [1, 2]
    assert _rows(["a", "b", "c"], 0, 1, 3, 3) == ["a"]
    assert _rows(None, 0, 1, 3, 3) is None
    with pytest.raises(
        TrainingError,
        match=r"its labels cannot be divided among 2 ranks: got \[\(2, 4\)\] for 4 examples, needed",
    ):
        _rows(torch.zeros(2, 4), 0, 2, 4, 2)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_items_that_cost_ever_less_are_shared_evenly(size):
    costs = range(12 * size, 0, -1)
    parts = [Share(SimpleNamespace(rank=rank, size=size)) for rank in range(size)]
    assert [part.owner(index) for part in parts[:1] for index in range(4)] == [
        [0, 0, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 2, 2],
    ][size - 1]
    shares = [sum(cost for index, cost in enumerate(costs) if part.has(index)) for part in parts]
    assert sum(shares) == sum(costs) and len(set(shares)) == 1


def test_a_process_by_itself_has_all_of_the_work():
    assert share().size == 1 and share().has(5) and share().gather("x", "letters") == ["x"]
    assert list(in_turns(lambda index, item: (index, item), "ab")) == [(0, "a"), (1, "b")]
    assert together(max, 1, 2) == 2
    with crew() as ranks:
        assert ranks.leads and ranks.ranks is None and ranks.everyone.told(3) == 3 and ranks.end(4) == 4


@pytest.mark.slow
def test_torchrun(tmp_path):
    torch.save(INPUTS, tmp_path / "inputs.pt")
    np.savez(
        tmp_path / "test.npz", inputs=INPUTS.numpy(), labels=torch.cat([y for _, y in labelled()]).numpy()
    )
    np.savez(tmp_path / "train.npz", inputs=torch.cat(BATCHES).numpy())
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "halfstep",
        "quantize", "test_distributed:network", "--labelled", "test.npz", "--calibration", "train.npz",
        "--directory", "run", "--threads", "1", "--batch", "16", "--rungs", "ptq", "--max-drop", "0.1",
    ]  # fmt: skip
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("deployed score") == 1
    assert (tmp_path / "run/model.onnx").exists() and (tmp_path / "run/report.html").exists()
