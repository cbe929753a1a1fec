"""A climb over all rungs that is killed again and again, half of the times to go on under a narrower instruction set.

The digits' network in 2 and 3 bits, with no layer allowed in float, so that every rung is climbed. An unbroken run says
what must come out; broken runs are killed (SIGKILL) at random moments until they end. No finished evaluation may be
made twice, no process may end in an error, and the decisions must be the same: to the letter, but for the figures of a
training whose steps ran under two instruction sets.

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
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import halfstep as hs
from bench.instructions import narrower
from halfstep.demo import DigitsNet, load_digits, train_digits
from halfstep.ladder.journal import read

KILLS_A_RUN = 8  # on average
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
    digits, model = load_digits(), DigitsNet().eval()
    model.load_state_dict(torch.load(folder.parent / WEIGHTS))
    images, labels = digits.train_images[:256], digits.train_labels[:256]
    training = hs.Training(
        list(zip(images.split(32), labels.split(32), strict=True)),
        nn.functional.cross_entropy,
        epochs=12,
        learning_rate=3e-3,
        evaluate_every=2,
        checkpoint_every=4,
    )
    hs.quantize(
        model,
        digits.train_images[:4],
        calibration=digits.calibration_batches(),
        metric=Marked(digits.test_batches(100), folder / "marks"),
        max_drop=0.0,
        recipe=hs.Recipe.uniform(2, 3, hs.PerTensor()),
        training=training,
        max_float=0.0,
        directory=folder / "run",
        threads=1,
    )


def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.crash", "--child", str(folder)],
            env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
            stdout=log,
            stderr=log,
        )


def finished(folder: Path) -> dict[str, object]:
    """What must not depend on kills."""
    record = json.loads((folder / "run" / "outcome.json").read_text())
    return {
        name: record[name] for name in ("met", "rung", "float_layers", "decisions", "score", "deployed_score")
    }


def masked(sentence: str, timeless: bool = True) -> str:
    """A sentence without its times, or without all its figures."""
    return (
        re.sub(r"[\d.,]+ (s|min|us)\b", "_", sentence)
        if timeless
        else re.sub(r"-?\+?\d[\d.,e-]*", "_", sentence)
    )


def repeated(folder: Path) -> int:
    """Evaluations that were finished and made again."""
    made = collections.Counter(
        (entry.data["rung"], entry.data["what"], entry.data["complete"], entry.data["allowed"])
        for entry in read(folder / "run")
        if entry.kind == "evaluation"
    )
    return sum(count - 1 for count in made.values())


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
    console, dice = Console(width=120), random.Random(options.seed)
    fewer = narrower()
    if not fewer:
        raise SystemExit(
            "no narrower instruction set is known for this processor: every run would be the same"
        )
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        torch.save(train_digits(load_digits()).state_dict(), place / WEIGHTS)
        unbroken, clock = place / "unbroken", time.perf_counter()
        if start(unbroken, {}).wait():
            raise SystemExit((unbroken / "log").read_text())
        seconds = time.perf_counter() - clock
        wanted, marks = finished(unbroken), len((unbroken / "marks").read_text())
        console.print(f"unbroken: {seconds:.0f} s, {marks} batches scored, on rung {wanted['rung']}")
        table = Table(title=f"{options.kills} kills, seed {options.seed}")
        for column in ("run", "kills", "with fewer instructions", "killed in", "evaluations made twice",
                       "batches scored more", "decisions the same", "but for figures", "outcome the same"):  # fmt: skip
            table.add_column(column, justify="right")
        kills = run = 0
        while kills < options.kills:
            folder, lives, places = place / f"run{run}", 0, collections.Counter[str]()
            narrow = 0
            while True:
                environment = fewer if (lives + run) % 2 else {}
                narrow += bool(environment)
                process = start(folder, environment)
                lives += 1
                last = kills + lives - 1 >= options.kills
                try:
                    # A life is long enough to begin, and on average for a part of the whole.
                    code = process.wait(None if last else seconds * dice.uniform(0.1, 0.1 + 2 / KILLS_A_RUN))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    entries = read(folder / "run") if (folder / "run" / "journal.jsonl").exists() else []
                    rungs = [
                        entry.data["rung"] for entry in entries if entry.kind in ("evaluation", "decision")
                    ]
                    places[(rungs and rungs[-1]) or "the beginning"] += 1
                    continue
                if code:
                    raise SystemExit(f"a process ended with {code}:\n{(folder / 'log').read_text()[-3000:]}")
                break
            got = finished(folder)
            kills += lives - 1
            same = [[masked(s) for s in each["decisions"]] for each in (wanted, got)]  # type: ignore[attr-defined]
            alike = [[masked(s, timeless=False) for s in each["decisions"]] for each in (wanted, got)]  # type: ignore[attr-defined]
            outcome = [
                {k: v for k, v in each.items() if k in ("met", "rung", "float_layers")}
                for each in (wanted, got)
            ]
            more = len((folder / "marks").read_text()) - marks
            table.add_row(
                str(run), str(lives - 1), str(narrow), ", ".join(f"{k} {v}" for k, v in places.items()),
                str(repeated(folder)), str(more), str(same[0] == same[1]), str(alike[0] == alike[1]),
                str(outcome[0] == outcome[1]),
            )  # fmt: skip
            if same[0] != same[1]:
                for a, b in zip(*same, strict=False):
                    if a != b:
                        console.print(
                            f"run {run}\n  unbroken: {a}\n  broken:   {b}", style="dim", highlight=False
                        )
            run += 1
        console.print(table)


if __name__ == "__main__":
    main()
