"""Files raced in heats: how many live at a time, and that a heat tells the same as one race of all."""

import gc
import shutil
import weakref

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.ladder import heats as races
from halfstep.ladder.costs import microseconds, race_choices
from halfstep.ladder.heats import heats
from halfstep.ladder.identity import free_memory
from halfstep.precision import groups_of
from halfstep.runtime.deployed import DeployedModel

NAMES = ("0", "2", "4", "6", "8", "10", "12")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layers = [layer for _ in NAMES[:-1] for layer in (nn.Linear(8, 8), nn.ReLU())]
    q = hs.prepare(nn.Sequential(*layers, nn.Linear(8, 3)), torch.randn(4, 8))
    hs.observe(q, [torch.randn(16, 8)])
    hs.calibrate(q)
    assert tuple(q.layer_names) == NAMES
    return q


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """What stands for every file, since only their names matter here."""
    return hs.export_onnx(model, tmp_path_factory.mktemp("heats") / "any.onnx", check=False)


class Course:
    """A race that is not run: each file takes the milliseconds planned for its float layers, later heats longer.

    Attributes:
        heats: the files of each, by name.
        alive: sessions that there were at most.
        files: the same of ONNX files on the disk.
    """

    def __init__(self, monkeypatch, file, milliseconds, drift=0.0, twins=()):
        self.heats, self.alive, self.files = [], 0, 0
        self._sessions = weakref.WeakSet()
        course = self

        class Counted(DeployedModel):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                self.chosen = planned[self.path.name]
                course._sessions.add(self)

        planned = {}

        def written(model, chosen, path):
            planned[path.name] = milliseconds(chosen["float"])
            return shutil.copy(file, path)

        def in_turns(contestants, rounds, warmup, leave):
            sessions = [run.func for run in contestants.values()]
            self.heats.append([session.path.name for session in sessions])
            self.alive = max(self.alive, len(self._sessions))
            self.files = max(self.files, len(list(sessions[0].path.parent.glob("*.onnx"))))
            late = drift * len(self.heats)
            times = [session.chosen + late for session in sessions]
            times[1] += dict(enumerate(twins)).get(len(self.heats) - 1, 0.0)
            return {name: [time] * rounds for name, time in zip(contestants, times, strict=True)}

        monkeypatch.setattr(races, "DeployedModel", Counted)
        monkeypatch.setattr(races, "_write", written)
        monkeypatch.setattr(races, "in_turns", in_turns)
        monkeypatch.setattr(races, "enough_rounds", lambda run, least: least)

    @property
    def left(self):
        """Sessions that are still there."""
        gc.collect()
        return len(self._sessions)


def by_name(floats):
    """One file takes 10 ms; each layer in float another time."""
    return 10.0 + sum(0.1 * (NAMES.index(name) - 3) for name in floats)


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_no_more_sessions_and_files_live_than_a_heat_has(model, file, monkeypatch, size):
    course = Course(monkeypatch, file, by_name)
    monkeypatch.setattr(races, "HEAT", size)
    before = model.precision
    assert len(microseconds(model, groups_of(model))) == len(NAMES)
    assert all(heat[:2] == ["base.onnx", "base.onnx"] and len(heat) <= size + 2 for heat in course.heats)
    assert [name for heat in course.heats for name in heat[2:]] == [f"{i}.onnx" for i in range(len(NAMES))]
    assert course.alive <= size + 2
    assert course.files <= size + 2  # the base, the heat, and the one that is to open the next
    assert course.left == 0 and model.precision == before


@pytest.mark.parametrize("bound", ["MEMORY", "free_memory"])
def test_heats_are_as_large_as_memory_has_room_for(model, file, monkeypatch, bound):
    course = Course(monkeypatch, file, by_name)
    room = 4 * file.stat().st_size * races.IN_MEMORY  # the base, its twin, and two files
    if bound == "MEMORY":
        monkeypatch.setattr(races, "MEMORY", room)
    else:
        monkeypatch.setattr(races, "free_memory", lambda: 2 * room)
    microseconds(model, groups_of(model))
    assert [len(heat) for heat in course.heats] == [4, 4, 4, 3]
    course.heats.clear()
    monkeypatch.setattr(races, "MEMORY", 0)
    microseconds(model, groups_of(model))
    assert [len(heat) for heat in course.heats] == [3] * len(NAMES)  # one races whatever it takes


@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_machine_that_slows_down_from_heat_to_heat_changes_no_difference(model, file, monkeypatch, size):
    Course(monkeypatch, file, by_name, drift=5.0)
    monkeypatch.setattr(races, "HEAT", size)
    assert microseconds(model, groups_of(model)) == pytest.approx([-300, -200, -100, 0, 100, 200, 300])
    choices = [model.precision, *[model.precision.but(float={n}) for n in NAMES]]
    times = race_choices(model, choices)
    assert [time - times[0] for time in times[1:]] == pytest.approx([-300, -200, -100, 0, 100, 200, 300])


@pytest.mark.parametrize("size", [1, 2, 16])
def test_tuning_finds_the_same_in_heats_as_in_one_race(model, file, monkeypatch, size):
    def slow_ends(floats):
        inside = [name in floats for name in NAMES]
        borders = sum(a != b for a, b in zip([False, *inside], [*inside, False], strict=True))
        return 10.0 + 0.4 * borders + sum(-2.0 if name in ("0", "2", "12") else 1.0 for name in floats)

    Course(monkeypatch, file, slow_ends, drift=3.0)
    monkeypatch.setattr(races, "HEAT", size)
    try:
        assert hs.tune(model).float_layers == ("0", "2", "12")
    finally:
        model.float_layers = []


def test_noise_is_that_of_the_heat(model, file, monkeypatch):
    Course(monkeypatch, file, by_name, twins=(0.0, 0.3))  # the second heat's base and twin differ by 300 us
    monkeypatch.setattr(races, "HEAT", 3)
    raced = heats(model, model.precision, [model.precision.but(float={n}) for n in NAMES])
    assert [file.noise for file in raced] == pytest.approx([0, 0, 0, 300, 300, 300, 0], abs=1e-6)
    found = microseconds(model, groups_of(model))
    assert found[:3] == pytest.approx([-300, -200, -100]) and found[6] == pytest.approx(300)


def test_real_heats_on_the_runtime(model, monkeypatch):
    monkeypatch.setattr(races, "HEAT", 3)
    raced = heats(model, model.precision, [model.precision] * 4, threads=1, rounds=3)
    assert len(raced) == 4 and all(file.base > 0 and file.noise >= 0 for file in raced)


def test_free_memory_is_a_number_of_bytes():
    assert 2**20 < free_memory() < 2**63
