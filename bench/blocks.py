"""Few bits without labels: today's quick repairs, reconstruction after them, and an epoch of training for comparison.

python -m bench.blocks --network resnet --bits W2A4         one network at one setting
python -m bench.blocks --network resnet --bits W2A4 --ablate   reconstruction without each of its parts
python -m bench.blocks --qat                                a training epoch on all labels beside it
python -m bench.blocks --network resnet --bits W4A4 --distil    two epochs of distillation on all images beside it
python -m bench.blocks                                      every network and setting

1,024 calibration images are observed, ranges are MSE's, first and last layers have 8 bits. The quick repairs are fitted
on half of them and judged on the other half, reconstruction learns on all. All 10,000 test images are scored; KL is the
divergence from the float network's answers on them, in nats, which tells more than the accuracy. What is lost has its
standard error beside it, of pairs of answers.
Seconds are those of the processor, its cores added up, for the repair alone; two quiet cores take half as many. Seeds
of networks: --seeds.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

import halfstep as hs
from bench import fashion
from bench.qat import Shuffled
from halfstep.cli.app import keep_freed_memory
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import divergences

SETTINGS = ("W4A4", "W3A4", "W3A3", "W2A8", "W2A4")

#: What is asked of reconstruction: points below float at most.
GOALS = {
    ("resnet", "W4A4"): 0.1,
    ("mobilenet", "W4A4"): 1.0,
    ("vit", "W4A4"): 0.2,
    ("resnet", "W2A8"): 1.5,
    ("resnet", "W2A4"): 3.0,
}

ABLATIONS = {
    "without dropping": hs.Reconstruction(drop=0.0),
    "without learned ranges": hs.Reconstruction(ranges=False),
    "with the Fisher weight": hs.Reconstruction(fisher=True),
    "all blocks together at the end": hs.Reconstruction(whole=True),
}

CALIBRATION = 1024


@dataclass(frozen=True)
class Row:
    """What was made of a network: accuracy in %, divergence from the float one in nats, seconds of the processor.

    ``error`` is the standard error of the accuracy lost, in points: images that float and quantized network judge alike
    add nothing to it.
    """

    what: str
    score: float
    error: float
    divergence: float
    seconds: float


class Case:
    """A network at one setting."""

    def __init__(self, network: str, bits: str, seed: int, data: fashion.Fashion) -> None:
        self.network, self.bits, self.seed, self.data = network, bits, seed, data
        model = fashion.trained(network, data, seed)
        self.q = hs.prepare(model, data.train_images[:4], recipe(bits))
        self.images = data.calibration(CALIBRATION)
        with self.q.using(Mode.FLOAT):
            self.float_logits = self._logits(self.q)
        self.float_score = self._accuracy(self.float_logits)
        hs.observe(self.q, self.images)
        hs.calibrate(self.q, hs.MSE(), hs.MSE())
        self.rows = [self._row("calibrated", self.q, 0.0)]
        self.q = self.made("quick repairs", self.q, lambda q: hs.repair(q, batches=self.images))

    def made(
        self, what: str, q: hs.QuantizedModel, work: Callable[[hs.QuantizedModel], object]
    ) -> hs.QuantizedModel:
        """Work on a copy of a model, and score it."""
        q = copy.deepcopy(q)
        start = time.process_time()
        work(q)
        seconds = time.process_time() - start
        self.rows.append(self._row(what, q, seconds))
        print(f"{self.network} {self.bits} seed {self.seed}: {self.rows[-1]}", flush=True)
        return q

    def reconstruct(self, what: str, options: hs.Reconstruction) -> None:
        self.made(what, self.q, lambda q: hs.reconstruct(q, self.images, options=options))

    def train(self, what: str, **options: Any) -> None:
        training = hs.Training(Shuffled(self.data), seed=self.seed, **options)
        self.made(what, self.q, lambda q: hs.train(q, training))

    def _row(self, what: str, q: hs.QuantizedModel, seconds: float) -> Row:
        logits = self._logits(q)
        divergence = float(divergences(self.float_logits, logits).mean())
        lost = self._hits(self.float_logits) - self._hits(logits)
        error = 100 * float(lost.std()) / len(lost) ** 0.5
        return Row(what, self._accuracy(logits), error, divergence, seconds)

    def _logits(self, q: hs.QuantizedModel) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([q(images) for images, _ in self.data.test()])

    def _accuracy(self, logits: torch.Tensor) -> float:
        return 100 * float(self._hits(logits).mean())

    def _hits(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits.argmax(1) == self.data.test_labels).double()


def recipe(bits: str) -> hs.Recipe:
    """Of bits as W4A5 says them: weights, activations."""
    found = re.fullmatch(r"W(\d+)A(\d+)", bits)
    if found is None:
        raise SystemExit(f"--bits: got {bits}, needed the like of W4A5")
    weights, activations = map(int, found.groups())
    return hs.Recipe.uniform(weights, activations)


def table(cases: list[Case]) -> Table:
    printed = Table(title="Fashion-MNIST, accuracy on 10,000 test images in %, seconds of the processor")
    for name in ("network", "bits", "seed", "float", "what", "accuracy", "below float", "asked", "KL", "s"):
        printed.add_column(name, justify="left" if name in ("network", "bits", "what") else "right")
    for case in cases:
        for index, row in enumerate(case.rows):
            first = index == 0
            head = [case.network, case.bits, str(case.seed), f"{case.float_score:.2f}"] if first else [""] * 4
            goal = GOALS.get((case.network, case.bits)) if row.what == "reconstructed" else None
            below = f"{case.float_score - row.score:.2f} ± {row.error:.2f}"
            asked = "" if goal is None else f"{goal:.1f}"
            printed.add_row(
                *head,
                row.what,
                f"{row.score:.2f}",
                below,
                asked,
                f"{row.divergence:.4f}",
                f"{row.seconds:.0f}",
            )
        printed.add_section()
    return printed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=list(fashion.NETWORKS), help="only this one")
    parser.add_argument("--bits", metavar="W4A5", help=f"only these; by default {', '.join(SETTINGS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the networks' training")
    parser.add_argument(
        "--ablate", action="store_true", help="reconstruction without each of its parts, and with more"
    )
    parser.add_argument("--qat", action="store_true", help="an epoch of training on all labels too")
    parser.add_argument(
        "--distil",
        action="store_true",
        help="and two epochs of distillation on all 60,000 images without labels",
    )
    options = parser.parse_args()
    data, cases = fashion.load(), []
    for network in [options.network] if options.network else fashion.NETWORKS:
        for bits in [options.bits] if options.bits else SETTINGS:
            for seed in options.seeds:
                case = Case(network, bits, seed, data)
                case.reconstruct("reconstructed", hs.Reconstruction())
                for what, without in ABLATIONS.items() if options.ablate else ():
                    case.reconstruct(what, without)
                if options.qat:
                    case.train("a training epoch", loss=cross_entropy)
                if options.distil:
                    answers = hs.Distillation(temperature=1.0, axis=1)
                    case.train(
                        "two epochs of distillation", distillation=answers, epochs=2, learning_rate=5e-4
                    )
                cases.append(case)
    Console(width=120).print(table(cases))


if __name__ == "__main__":
    keep_freed_memory()
    torch.manual_seed(0)
    main()
