"""Does the file answer as simulated? Operators one by one, then whole networks at every width, on both runtimes.

python -m bench.agreement                              # everything: about an hour on two busy cores
python -m bench.agreement --networks digits --targets openvino

Operators stand alone between quantizers of 8 bits. Networks are calibrated (MSE) on 512 images, and then trained
through their quantizers for some steps; file and simulation are compared on test images by the outputs' signal to noise
and by the share of equal answers. Beside these figures stands their control, on 256 images: given the file's own codes
before a site, how many of its codes the simulation would have rounded otherwise, how far beyond half a step the
furthest of them lies, and how far the outputs differ given the file's last codes. A float32 has 24 bits, so up to 1e-4
of a step is the rounding of the sums themselves: values that lie so near to a tie may fall to either side, and all that
follows them with it. Seeds: 0.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from bench import fashion
from halfstep.demo import load_digits, train_digits
from halfstep.export.mismatch import OUTPUTS, agreements
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel

TARGETS = ("onnxruntime", "openvino")
WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W3A3": (3, 3), "W2A8": (2, 8), "W2A2": (2, 2)}
CONTROL = 256  # images that sites are compared on


@dataclass(frozen=True)
class Data:
    """Images and labels of a network: for ranges, for training, for comparing."""

    calibration: list[torch.Tensor]
    training: list[tuple[torch.Tensor, torch.Tensor]]
    test: torch.Tensor


@dataclass(frozen=True)
class Control:
    """What sites say one by one, over all of them.

    Attributes:
        codes: compared.
        others: that the simulation rounds otherwise, given the file's codes before them.
        beyond: half a step the furthest lies, in steps.
        outputs: signal to noise of the outputs in dB, given the file's last codes.
        makers: of those rounded otherwise, by the operator whose sums they are.
    """

    codes: int
    others: int
    beyond: float
    outputs: float
    makers: dict[str, int]

    @classmethod
    def of(cls, q: hs.QuantizedModel, path: Path, inputs: torch.Tensor) -> Control:
        found = agreements(q, path, inputs)
        sites = [each for each in found if each.site != OUTPUTS]
        values = {site.name: site.positions[0].value for site in q.placement.sites}
        makers = Counter[str]()
        for each in filter(lambda each: each.others, sites):
            value = values[each.site]
            makers[value.op if value.op == "placeholder" else value.target.__name__.partition(".")[0]] += (
                each.others
            )
        return cls(
            sum(each.codes for each in sites),
            sum(each.others for each in sites),
            max((each.beyond for each in sites), default=0.0),
            found[-1].sqnr,
            dict(makers.most_common()),
        )

    def cells(self) -> list[str]:
        where = ", ".join(f"{maker} {count}" for maker, count in self.makers.items())
        return [f"{self.others:,} of {self.codes:,}", where, f"{self.beyond:.0e}", f"{self.outputs:.0f}"]


CONTROL_COLUMNS = ("codes rounded otherwise", "of what", "beyond half a step", "outputs, dB")


class Between(nn.Module):
    """One operator, read and followed by convs, so that it stands between quantizers."""

    def __init__(self, operator: Callable[..., torch.Tensor], channels: int = 16) -> None:
        super().__init__()
        self.first, self.other = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.last = nn.Conv2d(channels, 8, 1)
        self.operator = operator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.operator(self.first(x), self.other(x)))


class Layer(nn.Module):
    """A layer behind another one."""

    def __init__(self, layer: nn.Module, tokens: bool = False) -> None:
        super().__init__()
        self.first, self.layer, self.tokens = nn.Conv2d(3, 16, 3, padding=1), layer, tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        return self.layer(x.flatten(2).transpose(1, 2) if self.tokens else x)


class Attention(nn.Module):
    """Linear layers around an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(*heads).squeeze(1))


def _vector() -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)
    )


OPERATORS: dict[str, Callable[[], nn.Module]] = {
    "conv 3x3": lambda: Layer(nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 1))),
    "conv, depthwise": lambda: Layer(
        nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 8, 1))
    ),
    "conv, transposed": lambda: Layer(nn.Sequential(nn.ConvTranspose2d(16, 16, 2, 2), nn.Conv2d(16, 8, 1))),
    "linear on vectors, global pool": lambda: Layer(_vector()),
    "linear on tokens, GELU": lambda: Layer(
        nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)), tokens=True
    ),
    "layer norm": lambda: Layer(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)), tokens=True),
    "attention": lambda: Layer(Attention(), tokens=True),
    "product of activations": lambda: Between(lambda x, y: x @ y),
    "add": lambda: Between(lambda x, y: F.relu(x + y)),
    "mul": lambda: Between(lambda x, y: x * y),
    "concat": lambda: Between(lambda x, y: torch.cat([x, F.relu(y)], 1), 32),
    "sigmoid gate": lambda: Between(lambda x, y: x * torch.sigmoid(y)),
    "SiLU": lambda: Between(lambda x, _: F.silu(x)),
    "HardSwish": lambda: Between(lambda x, _: F.hardswish(x)),
    "hard sigmoid gate": lambda: Between(lambda x, y: x * F.hardsigmoid(3 * y)),
    "LeakyReLU": lambda: Between(lambda x, _: F.leaky_relu(x, 0.1)),
    "ReLU6": lambda: Between(lambda x, _: F.relu6(4 * x)),
    "tanh": lambda: Between(lambda x, _: torch.tanh(x)),
    "average pool": lambda: Between(lambda x, _: F.avg_pool2d(x, 2)),
    "max pool": lambda: Between(lambda x, _: F.max_pool2d(x, 2)),
    "resize, nearest": lambda: Between(lambda x, _: F.interpolate(x, scale_factor=2.0)),
    "resize, linear": lambda: Between(lambda x, _: F.interpolate(x, scale_factor=2.0, mode="bilinear")),
}


def quantized(
    model: nn.Module, recipe: hs.Recipe, target: str, calibration: Sequence[torch.Tensor]
) -> hs.QuantizedModel:
    q = hs.prepare(model, calibration[0][:4], recipe, target)
    hs.observe(q, calibration)
    hs.calibrate(q, hs.MSE(), hs.MSE())
    q.set_mode(Mode.QUANTIZE)
    return q


def operators(targets: Sequence[str], folder: Path, console: Console) -> None:
    """Every operator by itself: 64 random images, per channel weights, 8 bits."""
    table = Table(title="Operators between quantizers of 8 bits, 64 random images of 3x24x24")
    for name in ("operator", "target", *CONTROL_COLUMNS):
        table.add_column(name, justify="left" if name in ("operator", "target") else "right")
    for name, build in OPERATORS.items():
        for target in targets:
            torch.manual_seed(0)
            x = torch.randn(64, 3, 24, 24)
            q = quantized(build().eval(), hs.Recipe.int8(), target, [x])
            path = hs.export_onnx(q, folder / "operator.onnx", check=False)
            table.add_row(name, target, *Control.of(q, path, x).cells())
    console.print(table)


def digits() -> tuple[nn.Module, Data]:
    data = load_digits()
    return train_digits(data), Data(data.calibration_batches(512), data.training_batches(), data.test_images)


def network(name: str, images: int) -> tuple[nn.Module, Data]:
    if name == "digits":
        return digits()
    data = fashion.load()
    training = data.train(60_000, 64)
    return fashion.trained(name, data), Data(data.calibration(512), training, data.test_images[:images])


def rows(
    model: nn.Module, data: Data, widths: Sequence[str], targets: Sequence[str], steps: int, folder: Path
) -> Iterator[list[str]]:
    """A row for each width, target, and stage: calibrated, then trained."""
    for width in widths:
        for ends in (8, None) if min(WIDTHS[width]) < 8 else (None,):
            for target in targets:
                q = quantized(model, hs.Recipe.uniform(*WIDTHS[width], ends=ends), target, data.calibration)
                for stage in ("calibrated", "trained"):
                    if stage == "trained":
                        hs.train(q, hs.Training(data.training[:steps], F.cross_entropy, epochs=1))
                    bits = width + (", ends 8" if ends else "")
                    yield [bits, target, stage, *_figures(q, folder / "model.onnx", data.test)]


def _figures(q: hs.QuantizedModel, path: Path, images: torch.Tensor) -> list[str]:
    hs.export_onnx(q, path)  # its own check included
    file = DeployedModel(path, q.captured.in_spec, q.captured.out_spec)
    parity = compare(q, file, images.split(500))
    control = Control.of(q, path, images[:CONTROL])
    return [f"{parity.sqnr:.1f}", f"{parity.top1:.2%}", *control.cells()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["digits", *fashion.NETWORKS]
    parser.add_argument(
        "--networks", nargs="*", default=names, choices=names, help="none for operators alone"
    )
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--widths", nargs="*", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--images", type=int, default=2000, help="test images to compare on")
    parser.add_argument("--steps", type=int, default=30, help="of training, 64 images each")
    options = parser.parse_args()
    targets = [name for name in options.targets if name != "openvino" or find_spec("openvino")]
    torch.manual_seed(0)
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        operators(targets, folder, console)
        for name in options.networks:
            start = time.perf_counter()
            model, data = network(name, options.images)
            table = Table(title=f"{name}: file against simulation on {len(data.test):,} test images")
            columns = (
                "bits",
                "target",
                f"after (training: {options.steps} steps)",
                "SQNR, dB",
                "same answer",
            )
            for column in (*columns, *CONTROL_COLUMNS):
                table.add_column(column, justify="left" if column in columns[:3] else "right")
            for row in rows(model, data, options.widths, targets, options.steps, folder):
                table.add_row(*row)
            console.print(table)
            console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
