"""A climb over all rungs that is killed again and again, half of the times to go on under a narrower instruction set.

The demo's climb: the digits' network with weights of 2 bits, which takes every rung by a wide margin. An unbroken run
says what must come out; broken runs are killed (SIGKILL) until they end: so many lines of the journal after the process
began and some seconds more, so that kills fall over all rungs however busy the machine is. No process may end in an
error, no finished evaluation may be made twice. Runs whose processes all have the same instructions must decide alike
to the letter. Those that go on under fewer instructions add in another order: repairs in 2 bits then end elsewhere, so
there the verdict on every rung and the outcome must be the same.

python -m bench.crash                # 40 kills
python -m bench.crash --kills 8
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import halfstep as hs
from bench.instructions import narrower
from halfstep.cli.demo import ACTIVATION_BITS, IMAGES, MAX_DROP, MAX_FLOAT, WEIGHT_BITS, WIDTH
from halfstep.demo import DigitsNet, load_digits, train_digits
from halfstep.journal import read

KILLS_A_RUN = 8  # on average
MOMENT = 3.0  # seconds
WEIGHTS = "weights.pt"


class Marked(hs.Accuracy):
    """Writes a letter to a file for every batch scored."""

    def __init__(self, labelled: list[tuple[torch.Tensor, torch.Tensor]], marks: Path) -> None:
        super().__init__(labelled)
        self._marks = marks

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_marks": None}  # where it counts makes no difference

    def stream(self, *arguments, **options):  # type: ignore[no-untyped-def]
        for scores in super().stream(*arguments, **options):
            with self._marks.open("a") as file:
                file.write(".")
            yield scores


def climb(folder: Path) -> None:
    """One process: begin the run in ``folder``, or go on with it."""
    digits, model = load_digits(), DigitsNet(width=WIDTH).eval()
    model.load_state_dict(torch.load(folder.parent / WEIGHTS))
    hs.quantize(
        model,
        digits.train_images[:4],
        calibration=digits.calibration_batches(IMAGES, IMAGES),
        metric=Marked(digits.test_batches(100), folder / "marks"),
        max_drop=MAX_DROP,
        recipe=hs.Recipe.uniform(WEIGHT_BITS, ACTIVATION_BITS, hs.PerTensor(), ends=None),
        training=hs.Training(
            digits.training_batches(),
            nn.functional.cross_entropy,
            epochs=8,
            learning_rate=3e-3,
            evaluate_every=4,
            checkpoint_every=8,
        ),
        max_float=MAX_FLOAT,
        directory=folder / "run",
        threads=1,
    )


@dataclass
class Run:
    """A run that has ended: where it was killed, and what came out."""

    folder: Path
    narrow: int = 0  # processes with fewer instructions
    killed: collections.Counter[str] = field(default_factory=collections.Counter)  # by rung

    @property
    def decisions(self) -> list[str]:
        """Its sentences, without their times."""
        sentences = json.loads((self.folder / "run" / "outcome.json").read_text())["decisions"]
        return [re.sub(r"[\d.,]+ (s|min|us)\b", "_", sentence) for sentence in sentences]

    @property
    def verdicts(self) -> list[tuple[str, bool]]:
        """Each rung with whether it met the target, and what the run as a whole ended with."""
        steps = [(e.data["rung"], e.data["met"]) for e in read(self.folder / "run") if e.kind == "step"]
        record = json.loads((self.folder / "run" / "outcome.json").read_text())
        return [*steps, (f"outcome {record['rung']} {record['float_layers']}", record["met"])]

    @property
    def scored(self) -> int:
        """Batches, by all its processes."""
        return len((self.folder / "marks").read_text())

    @property
    def repeated(self) -> int:
        """Evaluations that were finished and made again."""
        made = collections.Counter(
            (entry.data["rung"], entry.data["what"], entry.data["complete"], entry.data["allowed"])
            for entry in read(self.folder / "run")
            if entry.kind == "evaluation"
        )
        return sum(count - 1 for count in made.values())


def lines(folder: Path) -> int:
    """Of the run's journal."""
    journal = folder / "run" / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def begin(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.crash", "--child", str(folder)],
            env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
            stdout=log,
            stderr=log,
        )


def ended(process: subprocess.Popen[bytes], folder: Path, more: int, moment: float) -> bool:
    """Whether it ends by itself; it is killed once the journal has so many ``more`` lines and a ``moment`` has passed.

    Raises:
        SystemExit: if it ends in an error.
    """
    enough, code = lines(folder) + more, None
    while (code := process.poll()) is None and lines(folder) < enough:
        time.sleep(0.01)
    try:
        code = process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    if code:
        raise SystemExit(f"a process ended with {code}:\n{(folder / 'log').read_text()[-3000:]}")
    return True


def broken(folder: Path, kills: int, fewer: dict[str, str], length: int, dice: random.Random) -> Run:
    """A run killed at most ``kills`` times, whose processes after the first have ``fewer`` instructions."""
    run, environment = Run(folder), {}
    while True:
        process = begin(folder, environment)
        run.narrow += bool(environment)
        dead = sum(run.killed.values()) == kills
        more = length if dead else dice.randint(0, 2 * length // KILLS_A_RUN)
        if ended(process, folder, more, 1e6 if dead else dice.uniform(0, MOMENT)):
            return run
        rungs = [
            e.data["rung"]
            for e in (read(folder / "run") if lines(folder) else [])
            if e.kind in ("evaluation", "decision") and e.data["rung"]
        ]
        run.killed[rungs[-1] if rungs else "the beginning"] += 1
        environment = fewer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        climb(options.child)
        return
    console, dice, fewer = Console(width=120), random.Random(options.seed), narrower()
    if not fewer:
        raise SystemExit(
            "no narrower instruction set is known for this processor: every run would be the same"
        )
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        torch.save(train_digits(load_digits(), width=WIDTH).state_dict(), place / WEIGHTS)
        clock = time.perf_counter()
        whole = broken(place / "unbroken", 0, {}, 0, dice)
        console.print(
            f"unbroken: {time.perf_counter() - clock:.0f} s, {whole.scored} batches scored, "
            + ", ".join(f"{what} {'met' if met else 'not met'}" for what, met in whole.verdicts)
        )
        table, wrong, left, length = Table(), 0, options.kills, lines(whole.folder)
        for column in ("instructions", "kills", "after", "evaluations made twice", "batches scored more",
                       "decisions to the letter", "verdicts"):  # fmt: skip
            table.add_column(column, justify="right")
        for number in range(options.kills):
            mixed = bool(number % 2)
            run = broken(place / f"run{number}", left, fewer if mixed else {}, length, dice)
            left -= run.killed.total()
            letter, verdicts = run.decisions == whole.decisions, run.verdicts == whole.verdicts
            wrong += bool(run.repeated) or not verdicts or not (letter or mixed)
            table.add_row(
                f"fewer in {run.narrow} of {run.killed.total() + 1}" if mixed else "the same",
                str(run.killed.total()), ", ".join(f"{rung} {n}" for rung, n in run.killed.items()),
                str(run.repeated), str(run.scored - whole.scored),
                "yes" if letter else "no", "the same" if verdicts else str(run.verdicts),
            )  # fmt: skip
            if not left:
                break
        console.print(table)
        if wrong:
            raise SystemExit(f"{wrong} runs differ from the unbroken one")


if __name__ == "__main__":
    main()
