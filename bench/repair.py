"""Repairs for few bits on the Fashion-MNIST networks: each alone, all together, and the seconds each takes.

python -m bench.repair                         # every network
python -m bench.repair --network rescaled      # channels scaled by 2^N(0, 2), the same function
python -m bench.repair --network rescaled --draw 3 --bits W4A8 --together --swept      # another draw of them

512 calibration images are observed, ranges are MSE's (swept: the best of all calibrators), the repairs work on the
sample of 256 that the model keeps, and all 10,000 test images are scored. First and last layers have 8 bits. Nothing is
trained. Seeds: 0.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import halfstep as hs
from bench import fashion
from halfstep.ladder.repairs import PASSES

#: Best of the peers, by network and bits, as measured on 2026-11-23 on networks of the same kind and size (float ResNet
#: 90.55%), 512 calibration images, all test images; on the rescaled ResNet at W8A8.
PEERS = {
    ("resnet", "W4A8"): "88.9 Model Optimizer",
    ("resnet", "W4A4"): "81.9 Brevitas",
    ("mobilenet", "W4A8"): "89.5 AIMET",
    ("mobilenet", "W4A4"): "69.8 AIMET",
    ("vit", "W4A8"): "86.9 Brevitas",
    ("vit", "W4A4"): "85.6 Brevitas",
    ("rescaled", "W8A8"): "90.5 AIMET",
    ("rescaled", "W8A8, one scale a tensor"): "17 ONNX Runtime",
}

#: What is asked for: points below float at most.
ALLOWED = {
    ("resnet", "W4A8"): 0.8,
    ("resnet", "W4A4"): 3.0,
    ("mobilenet", "W4A8"): 0.8,
    ("mobilenet", "W4A4"): 8.0,
    ("vit", "W4A8"): 0.4,
    ("vit", "W4A4"): 1.5,
    ("rescaled", "W8A8"): 0.2,
}

RECIPES = {
    "W4A8": hs.Recipe.uniform(4, 8),
    "W4A4": hs.Recipe.uniform(4, 4),
    "W8A8": hs.Recipe.int8(),
    "W8A8, one scale a tensor": hs.Recipe.uniform(8, 8, weight_granularity=hs.PerTensor()),
}

#: Batch norms that write the same channels, and the layers that read them.
Streams = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]

#: Of a SmallResNet.
STREAMS: Streams = (
    (("bn", "layer1.bn2"), ("layer1.conv1", "layer2.conv1", "layer2.downsample.0")),
    (("layer1.bn1",), ("layer1.conv2",)),
    (("layer2.bn2", "layer2.downsample.1"), ("layer3.conv1", "layer3.downsample.0")),
    (("layer2.bn1",), ("layer2.conv2",)),
    (("layer3.bn2", "layer3.downsample.1"), ("fc",)),
    (("layer3.bn1",), ("layer3.conv2",)),
)


@torch.no_grad()
def rescaled(model: nn.Module, seed: int = 0, streams: Streams = STREAMS) -> nn.Module:
    """The same function: channels multiplied by 2^N(0, 2) where they are written, divided where they are read."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for writers, readers in streams:
        norms = [model.get_submodule(name) for name in writers]
        factors = torch.exp2(2 * torch.randn(len(norms[0].weight), generator=generator))
        for norm in norms:
            norm.weight.mul_(factors)
            norm.bias.mul_(factors)
        for name in readers:
            weight = model.get_submodule(name).weight
            weight.div_(factors.view(1, -1, *[1] * (weight.dim() - 2)))
    return model


class Case:
    """One network at one recipe: what was scored, and how long it took."""

    def __init__(
        self, name: str, bits: str, model: nn.Module, data: fashion.Fashion, count: int, swept: bool
    ) -> None:
        self.name, self.bits = name, bits
        self.metric = hs.Accuracy(data.test(count))
        start = time.perf_counter()
        self.base = hs.prepare(model, data.train_images[:4], RECIPES[bits])
        self.float_score = 100 * self.metric.evaluate(self.base).value
        hs.observe(self.base, data.calibration(512))
        self.rows: list[tuple[str, float, float]] = []
        for calibrator in (hs.Max(), hs.MSE()):
            start = time.perf_counter()
            hs.calibrate(self.base, calibrator, calibrator)
            self.score(f"{calibrator} ranges", self.base, time.perf_counter() - start)
        if swept:
            start = time.perf_counter()
            hs.calibrate(self.base, hs.best_of())
            self.score("compared ranges", self.base, time.perf_counter() - start)

    def score(self, what: str, q: hs.QuantizedModel, seconds: float) -> None:
        self.rows.append((what, 100 * self.metric.evaluate(q).value, seconds))

    def run(self, alone: bool) -> hs.Repairs:
        for each in PASSES if alone else ():
            q = copy.deepcopy(self.base)
            done = each(q, None)
            self.score(done.name, q, done.seconds)
        q = copy.deepcopy(self.base)
        found = hs.repair(q)
        self.score("all, kept where better", q, found.seconds)
        return found


def show(name: str, cases: list[Case], console: Console) -> None:
    float_score = cases[0].float_score
    table = Table(title=f"Fashion-MNIST, {name}: float {float_score:.2f}%, accuracy in %, seconds on 2 cores")
    table.add_column("repair")
    for case in cases:
        table.add_column(case.bits, justify="right")
        table.add_column("s", justify="right")
    for index, (what, *_) in enumerate(cases[0].rows):
        cells = [what]
        for case in cases:
            cells += [f"{case.rows[index][1]:.2f}", f"{case.rows[index][2]:.1f}"]
        table.add_row(*cells, end_section=index in (1, len(cases[0].rows) - 2))
    last = [(case.float_score - case.rows[-1][1], ALLOWED.get((name, case.bits))) for case in cases]
    table.add_row("points below float", *[cell for drop, _ in last for cell in (f"{drop:+.2f}", "")])
    allowed = [cell for _, bound in last for cell in ("" if bound is None else f"{bound:.1f}", "")]
    table.add_row("allowed", *allowed)
    table.add_row(
        "best peer, 2026-11-23", *[cell for case in cases for cell in (PEERS.get((name, case.bits), ""), "")]
    )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*fashion.NETWORKS, "rescaled"]
    parser.add_argument("--network", choices=names, help="only this one")
    parser.add_argument("--bits", choices=list(RECIPES), help="only these")
    parser.add_argument("--draw", type=int, default=0, help="of the rescaled network's factors")
    parser.add_argument("--swept", action="store_true", help="start from the best of all calibrators")
    parser.add_argument("--images", type=int, default=10_000, help="test images to score")
    parser.add_argument("--together", action="store_true", help="leave out the single repairs")
    options = parser.parse_args()
    torch.manual_seed(0)
    data, console = fashion.load(), Console()
    for name in [options.network] if options.network else names:
        wide = name == "rescaled"
        model = fashion.trained("resnet" if wide else name, data)
        model = rescaled(model, options.draw) if wide else model
        chosen = [bits for bits in RECIPES if bits.startswith("W8") == wide]
        cases, explained = [], []
        for bits in [options.bits] if options.bits else chosen:
            case = Case(name, bits, model, data, options.images, options.swept)
            explained.append(f"{bits}: {case.run(not options.together)}")
            cases.append(case)
        show(name, cases, console)
        console.print("\n".join(explained), highlight=False)


if __name__ == "__main__":
    main()
