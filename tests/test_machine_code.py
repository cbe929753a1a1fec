"""Loops are compiled once for a processor: what a second process finds, and what it does where nothing can be kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from numba.core import config

from halfstep import machine_code
from halfstep.functional import fitting, lookup
from halfstep.machine_code import compiled, folder
from halfstep.statistics import Histogram
from halfstep.statistics.kernels import kernels

X = torch.linspace(-1, 1, 200_000)


def every_loop() -> dict[str, Any]:
    """What every compiled loop of halfstep answers, and how many were compiled here."""
    torch.set_num_threads(2)
    histogram = Histogram()
    histogram.update(X)  # by two threads
    histogram.update(X[:10])  # by one
    thresholds, values = torch.tensor([-0.5, 0.5]), torch.tensor([-1.0, 0.0, 1.0])
    down, up = X.clone(), X.clone()
    lookup.replace(down, values, thresholds, ties_up=False)
    lookup.replace(up, values, thresholds, ties_up=True)
    answers = [
        *[part.double().sum() for part in histogram.state_dict().values()],
        *(down.sum(), up.sum(), lookup.totals(X, torch.ones_like(X), thresholds).sum()),
        *fitting.exact_kmeans(np.arange(40.0) ** 2, None, 3),
    ]
    loops = [*vars(kernels()).values(), *lookup._compiled(), fitting._compiled_boundaries()]
    misses = sum(sum(loop.stats.cache_misses.values()) for loop in loops)
    return {"answers": [float(answer) for answer in answers], "loops": len(loops), "compiled": misses}


def in_a_process(place: Path) -> subprocess.Popen[str]:
    code = "import json; from tests.test_machine_code import *; print(json.dumps(every_loop()))"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(place)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert not process.returncode, err
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.slow
def test_processes_that_start_at_once_compile_and_the_next_one_does_not(tmp_path: Path) -> None:
    with in_a_process(tmp_path) as one, in_a_process(tmp_path) as two:
        first, other = answer(one), answer(two)
    with in_a_process(tmp_path) as process:
        second = answer(process)
    assert first["compiled"] and second == {**first, "compiled": 0} == {**other, "compiled": 0}
    assert len([*folder_in(tmp_path).iterdir()]) == first["loops"]  # nothing temporary is left


def folder_in(place: Path) -> Path:
    return place / "halfstep"


@njit
def twice(x: Any) -> Any:
    return 2 * x


def make(name: str = "doubled", parallel: bool = False) -> Callable[..., Any]:
    """A loop as a new process has it, not compiled yet."""
    factor = 1.5  # in the closure

    def doubled(x: Any) -> Any:
        return twice(x) * factor

    return compiled(doubled, name, parallel)


def compiles(loop: Callable[..., Any], argument: Any = 1.0) -> bool:
    assert loop(argument) == 3 * argument
    return bool(loop.stats.cache_misses)  # type: ignore[attr-defined]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    return folder_in(tmp_path)


def test_each_signature_and_each_name_is_kept_by_itself(place: Path) -> None:
    assert compiles(make()) and not compiles(make())
    assert compiles(make(), 1) and not compiles(make(), 1)
    assert compiles(make("other")) and len([*place.iterdir()]) == 3


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:70] + b"?" + b[71:], lambda b: b"", lambda b: b"x"]
)
def test_a_damaged_file_is_compiled_again(place: Path, damage: Callable[[bytes], bytes]) -> None:
    compiles(make())
    (file,) = place.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert compiles(make())
    assert not compiles(make())


def test_other_sources_another_processor_or_another_numba_compile_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiles(make())
    with monkeypatch.context() as other:
        other.setattr(machine_code, "_sources", lambda package: "other")
        assert compiles(make())
    with monkeypatch.context() as other:
        other.setattr(machine_code.numba, "__version__", "0.0")
        assert compiles(make())
    with monkeypatch.context() as other:
        other.setattr(type(twice.targetctx.codegen()), "magic_tuple", lambda self: ("x86_64", "other", ""))
        assert compiles(make())
    assert not compiles(make())


def test_any_module_of_the_package_counts_as_source(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    before = machine_code._sources(tmp_path)
    machine_code._sources.cache_clear()
    (tmp_path / "b.py").write_text("b")
    assert None is not before != machine_code._sources(tmp_path)
    assert machine_code._sources(tmp_path / "archive.zip") is None


def test_where_nothing_can_be_written_each_process_compiles(place: Path) -> None:
    place.write_text("a file where the folder should be")
    assert compiles(make()) and compiles(make())
    assert place.read_text() == "a file where the folder should be"


def test_a_full_disk_leaves_nothing_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert compiles(make()) and not [*place.iterdir()]


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setattr(
        machine_code, "user_cache_dir", lambda: "~/.cache"
    )  # as it stands where no home is known
    assert folder() is None
    assert compiles(make()) and compiles(make())
    assert not Path("~").exists()
