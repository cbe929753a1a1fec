"""Quantization-aware training on Fashion-MNIST: float, best PTQ, QAT and the float control, by number format.

python -m bench.qat                                     the table of all runs that are in bench/cache/qat
python -m bench.qat --run W4A4 --network resnet         train one setting and add it (a minute an epoch on 2 cores)
python -m bench.qat --run "W4A4 control"                its float control: as many epochs at the same learning rate
python -m bench.qat --all                               train all that the table lacks; stopped, it goes on where it was
python -m bench.qat --step                              a training step's time over a float one's

Every figure is on all 10,000 test images. The last state is reported: nothing is selected on the test set. First and
last layers have 8 bits in every setting below 8. Learning rates are the library's defaults. Settings of equal epochs
and rate share a float control. PTQ is the best of MSE and max ranges, MSE for weights, and repaired where the setting
says so, as the ladder does. Partial quantization puts back to float what 0.3 points need, and says how many layers
that is.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy

import halfstep as hs
from bench import fashion
from halfstep.cli.app import keep_freed_memory
from halfstep.fake_quantize import Mode
from halfstep.formats import Codebook
from halfstep.model import QuantizedModel
from halfstep.training.fit import fit, learning_rate
from halfstep.training.trained import Judgement

RESULTS = fashion.CACHE / "qat"
PARTIAL_DROP = 0.003


def symmetric(*positive: float) -> Codebook:
    half = torch.tensor(positive)
    return Codebook(torch.cat([-half.flip(0), half]), name="normal")


#: The best four and sixteen values for normally distributed weights (Lloyd-Max), in units of their deviation.
NORMAL_4 = symmetric(0.4528, 1.5104)
NORMAL_16 = symmetric(0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326)


@dataclass(frozen=True)
class Setting:
    """A row of the table: number formats, epochs, and whether training starts from the repaired calibration."""

    recipe: hs.Recipe
    epochs: int
    repaired: bool = False


SETTINGS = {
    "W8A8": Setting(hs.Recipe.uniform(8, 8), 1),
    "W4A8": Setting(hs.Recipe.uniform(4, 8), 1),
    "W4A8 codebook": Setting(hs.Recipe.uniform(NORMAL_16, 8), 1),
    "W4A4": Setting(hs.Recipe.uniform(4, 4), 2),
    "W4A4 repaired": Setting(hs.Recipe.uniform(4, 4), 3, repaired=True),
    "W2A8": Setting(hs.Recipe.uniform(hs.Integer(2, mid_rise=True), 8), 2),
    "W2A8 codebook": Setting(hs.Recipe.uniform(NORMAL_4, 8), 2),
    "ternary A8": Setting(hs.Recipe.uniform(hs.Integer(2), 8), 2),
    "W2A2": Setting(hs.Recipe.uniform(hs.Integer(2, mid_rise=True), 2), 3),
    "binary A8": Setting(hs.Recipe.uniform(Codebook.binary(), 8), 3),
}

#: After a setting's name: the same training without quantizers.
CONTROL = " control"

#: What is trained from three networks, seeds 0 to 2.
HEADLINE = ("resnet", "W4A4")


class Shuffled:
    """The training images in a new order each epoch, every batch of 128 flipped or not."""

    def __init__(self, data: fashion.Fashion, count: int = 60_000) -> None:
        self.data, self.count = data, count

    def __len__(self) -> int:
        return -(-self.count // 128)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in torch.randperm(self.count).split(128):
            images = self.data.train_images[index]
            yield images.flip(-1) if torch.rand(()) < 0.5 else images, self.data.train_labels[index]


def accuracy(model: Callable[[torch.Tensor], torch.Tensor], data: fashion.Fashion) -> float:
    return hs.Accuracy(data.test()).evaluate(model).value


def post_training(model: nn.Module, setting: Setting, data: fashion.Fashion) -> tuple[QuantizedModel, float]:
    """The better of two activation calibrators by the training images' accuracy, and its test accuracy."""
    q = hs.prepare(model, data.train_images[:4], setting.recipe)
    hs.observe(q, data.calibration(512))
    scorer = hs.Accuracy(data.train(2000, 500))
    scores = {}
    for calibrator in (hs.MSE(), hs.Max()):
        hs.calibrate(q, calibrator, hs.MSE())
        scores[calibrator] = scorer.evaluate(q).value
    hs.calibrate(q, max(scores, key=lambda calibrator: scores[calibrator]), hs.MSE())
    if setting.repaired:
        hs.repair(q)
    return q, accuracy(q, data)


def run(
    network: str, name: str, seed: int, changes: dict[str, float], data: fashion.Fashion
) -> dict[str, Any]:
    """Train one setting, or its float control."""
    setting, control = SETTINGS[name.removesuffix(CONTROL)], name.endswith(CONTROL)
    model = fashion.trained(network, data, seed)
    q, ptq = post_training(model, setting, data)
    with q.using(Mode.FLOAT):
        float_score = accuracy(q, data)
    options = {"epochs": setting.epochs, "seed": seed} | changes
    options["evaluate_every"] = options["epochs"] if control else 0.25
    training = hs.Training(Shuffled(data), cross_entropy, **options)
    training = replace(training, learning_rate=learning_rate(training, q))
    partial = None
    if not control:
        mixed = copy.deepcopy(q)
        found = hs.partial(mixed, hs.Accuracy(data.test()), max_drop=PARTIAL_DROP)
        partial = [found.score, len(mixed.float_layers)]
    q.set_mode(Mode.FLOAT if control else Mode.QUANTIZE)

    def judge(step: int) -> Judgement:
        score = accuracy(q, data)
        print(f"{network} {name}: step {step}, {score:.2%}", flush=True)
        return Judgement(score, drop=-step, enough=False)  # the last state is the one to keep

    # A run that is stopped goes on from its last checkpoint; one with other options has another folder.
    folder = f"{network}-{name}-{seed}-{training.epochs}-{training.learning_rate}"
    trained = fit(q, training, judge, RESULTS / folder)
    return {
        "float": float_score,
        "ptq": ptq,
        "partial": partial,
        "qat": trained.marks[-1].score,
        "marks": [asdict(mark) for mark in trained.marks],
        "seconds": trained.seconds,
        "steps": trained.steps,
        "options": training.describe(),
    }


def result_file(network: str, setting: str, seed: int) -> Path:
    return RESULTS / f"{network}-{setting}-{seed}.json"


def control_file(network: str, seed: int, options: dict[str, str]) -> Path:
    """Where the control of all runs with these options is."""
    return RESULTS / f"{network}{CONTROL}-{seed}-{options['epochs']}-{options['learning_rate']}.json"


def keep_run(network: str, setting: str, seed: int, changes: dict[str, float], data: fashion.Fashion) -> None:
    result = run(network, setting, seed, changes, data)
    RESULTS.mkdir(parents=True, exist_ok=True)
    control = setting.endswith(CONTROL)
    file = control_file(network, seed, result["options"]) if control else result_file(network, setting, seed)
    file.write_text(json.dumps(result, indent=1) + "\n")


def missing() -> Iterator[tuple[str, str, int]]:
    """What the table lacks, the headline first; each setting is trained before its control is asked for."""
    order = [(*HEADLINE, seed) for seed in range(3)]
    order += [(network, setting, 0) for network in ("resnet", "mobilenet") for setting in SETTINGS]
    for network, setting, seed in dict.fromkeys(order):
        file = result_file(network, setting, seed)
        if not file.exists():
            yield network, setting, seed
        if not control_file(network, seed, json.loads(file.read_text())["options"]).exists():
            yield network, setting + CONTROL, seed


def recovery(result: dict, share: float = 0.95) -> str:
    """Steps and seconds of training until ``share`` of PTQ's loss was won back, by the first mark that shows it.

    The steps tell it where other work slowed the run down; ``--step`` measures what one takes.
    """
    wanted = result["float"] - (1 - share) * (result["float"] - result["ptq"])
    if result["ptq"] >= result["float"] - 0.002:
        return "nothing to win"
    found = [mark for mark in result["marks"] if mark["score"] >= wanted]
    return f"{found[0]['step']} steps, {found[0]['seconds']:.0f} s" if found else "-"


def table() -> Table:
    printed = Table(title="Fashion-MNIST, accuracy on 10,000 test images in %, one line a run")
    for name in ("network", "setting", "seed", "epochs"):
        printed.add_column(name)
    for name in (
        "float",
        "best PTQ",
        "partial (layers in float)",
        "QAT",
        "QAT - float",
        "float control",
        "95% won back",
    ):
        printed.add_column(name, justify="right")
    for network in fashion.NETWORKS:
        for setting in SETTINGS:
            for file in sorted(RESULTS.glob(f"{network}-{setting}-[0-9].json")):
                result = json.loads(file.read_text())
                control = control_file(network, int(file.stem[-1]), result["options"])
                floated = json.loads(control.read_text())["qat"] if control.exists() else None
                printed.add_row(
                    network,
                    setting,
                    file.stem[-1],
                    result["options"]["epochs"],
                    *(f"{100 * result[name]:.2f}" for name in ("float", "ptq")),
                    "{:.2f} ({})".format(100 * result["partial"][0], result["partial"][1]),
                    f"{100 * result['qat']:.2f}",
                    f"{100 * (result['qat'] - result['float']):+.2f}",
                    "" if floated is None else f"{100 * floated:.2f}",
                    recovery(result),
                )
    return printed


def step_times(network: str, data: fashion.Fashion, rounds: int, compiled: bool) -> Table:
    """Forward, backward and optimizer on one batch of 128, interleaved: float, QAT with fixed and learned ranges."""
    images, labels = data.train_images[:128], data.train_labels[:128]
    model = fashion.trained(network, data)
    fixed = hs.prepare(model, data.train_images[:4], SETTINGS["W4A4"].recipe)
    hs.observe(fixed, data.calibration(512))
    hs.calibrate(fixed)
    learned = copy.deepcopy(fixed)
    for module in learned.sites.values():
        module.learn()
    float_model = copy.deepcopy(fixed)
    float_model.set_mode(Mode.FLOAT)
    names = {
        "float": float_model,
        "float again (null)": float_model,
        "QAT, fixed ranges": fixed,
        "QAT, learned ranges": learned,
    }
    optimizers = {name: torch.optim.AdamW(each.parameters(), 1e-5) for name, each in names.items()}
    call = {name: torch.compile(each) if compiled else each for name, each in names.items()}

    def step(name: str) -> float:
        start = time.perf_counter()
        optimizers[name].zero_grad()
        cross_entropy(call[name](images), labels).backward()
        optimizers[name].step()
        return time.perf_counter() - start

    for name in names:
        step(name), step(name), step(name)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(step(name))
    printed = Table(
        title=f"{network}, W4A4, a training step on 128 images, {'compiled' if compiled else 'eager'}, "
        f"{torch.get_num_threads()} threads, {rounds} interleaved rounds"
    )
    for name in ("step", "ms, median", "x float"):
        printed.add_column(name, justify="left" if name == "step" else "right")
    for name, measured in times.items():
        ratio = statistics.median(a / b for a, b in zip(measured, times["float"], strict=True))
        printed.add_row(name, f"{1000 * statistics.median(measured):.1f}", f"{ratio:.2f}")
    return printed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", metavar="SETTING", help=f"one of {', '.join(SETTINGS)}; ' control' after it")
    parser.add_argument("--all", action="store_true", help="train all that the table lacks")
    parser.add_argument("--network", default="resnet", choices=sorted(fashion.NETWORKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--step", action="store_true", help="time a step")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile")
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    console = Console(width=120)
    if options.step:
        data = fashion.load()
        console.print(step_times(options.network, data, options.rounds, options.compiled))
        return
    if options.all:
        data = fashion.load()
        for network, setting, seed in missing():
            keep_run(network, setting, seed, {}, data)
    if options.run:
        changes = {"epochs": options.epochs, "learning_rate": options.rate}
        changes = {name: value for name, value in changes.items() if value is not None}
        keep_run(options.network, options.run, options.seed, changes, fashion.load())
    console.print(table())


if __name__ == "__main__":
    keep_freed_memory()  # else the time of a step or pass depends on what the process freed before
    torch.manual_seed(0)
    main()
