"""Bits per layer at equal size: `hs.mixed_bits` beside CLADO's assignment, and beside that without interactions.

python -m bench.bits --network resnet
python -m bench.bits --network vit --bytes stored

CLADO (Deng, Sharma, Kundu, Tambe, "CLADO: mixed-precision quantization by cross-layer dependency of errors", DAC 2025,
arXiv 2307.05657) measures what the loss on a calibration sample rises by with each layer at each width, and with each
pair of them, and solves the integer quadratic program for the least sum within a bound on the bytes. Here losses are
cross entropies with labels, as published, or divergences from float (kl); products of binaries are made linear, so that
``scipy.optimize.milp`` finds the optimum of the very program. ``separable`` is that of cross entropies with the
interactions left out. None of them asks the metric; ours is told a drop, and the others get the bytes that it ends at.
Losses are kept in ``bench/cache``.

All start from the same network in W8A8 with the same ranges of weights at 8, 4 and 2 bits, calibrated on 1,024 training
images, and nothing is repaired but in the column that says so. Searches judge on the first 5,000 test images;
accuracies are those of the other 5,000. Seed 0.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch.nn import functional as F

import halfstep as hs
from bench import fashion
from halfstep.fidelity.replay import Replay, Wiring, quantizing, wiring
from halfstep.graph.layer_precision import WIDTHS, LayerPrecision
from halfstep.ladder.mixed_bits import COUNTS, Counted, movable
from halfstep.precision import Group

BITS = (8, 4, 2)
CALIBRATION = 1024
DROPS = (0.005, 0.015, 0.04, 0.1)
LOSSES = ("cross entropy", "kl")
#: Columns: by which losses, and whether with interactions.
SOLVED = {
    "CLADO, bytes": ("cross entropy", True),
    "CLADO by kl": ("kl", True),
    "separable": ("cross entropy", False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet", choices=sorted(fashion.NETWORKS))
    parser.add_argument("--bytes", default="nominal", choices=sorted(COUNTS))
    parser.add_argument("--drops", default=",".join(map(str, DROPS)))
    parser.add_argument("--no-repair", action="store_true", help="leave the column with repairs out")
    options = parser.parse_args()
    console = Console(width=150)
    data = fashion.load()
    network = fashion.trained(options.network, data)
    calibration = data.train(CALIBRATION, batch=128)
    model = hs.prepare(network, data.train_images[:4], hs.Recipe.int8(portable=False))
    hs.observe(model, [images for images, _ in calibration])
    hs.calibrate(model, hs.best_of())
    test = data.test(batch=250)
    judged, held = hs.Accuracy(test[:20]), hs.Accuracy(test[20:])

    groups = movable(model)
    sizes = bytes_of(model, groups, options.bytes)
    losses, measured = kept(fashion.CACHE / f"bits-{options.network}.npz", model, groups, calibration)
    eight = f"{held.evaluate(model).value:.2%}"
    programs = {by: Program.of(sizes, losses[index]) for index, by in enumerate(LOSSES)}
    title = (
        f"{options.network}: {len(groups)} groups, {options.bytes} bytes of weights (8 bits: "
        f"{sum(size[0] for size in sizes):,}); accuracy on 5,000 test images, 8 bits {eight}, float "
        f"{held.evaluate(network).value:.2%}; losses of {losses.shape[1]} assignments on {CALIBRATION:,} images took "
        f"{measured:.0f} s"
    )
    table = Table(title=title)
    columns = ("drop asked", "bytes", "ours", "evaluations", "s")
    for column in (*columns, *SOLVED, *([] if options.no_repair else ["ours, repaired", "bytes"])):
        table.add_column(column, justify="right")
    scores: dict[tuple[int, ...], str] = {}

    def score(levels: Sequence[int]) -> str:
        """The accuracy of an assignment, each judged once."""
        if (known := tuple(levels)) not in scores:
            model.choose(assigned(groups, levels))
            scores[known] = f"{held.evaluate(model).value:.2%}"
            model.choose(LayerPrecision())
        return scores[known]

    for drop in map(float, options.drops.split(",")):
        found, _, seconds = search(model, judged, drop, options.bytes, repair=False)
        assert found.widths is not None
        ours = [BITS.index(group.bits) for group in found.widths.rows]
        row = [f"{drop:.1%}", f"{found.widths.bytes:,}", score(ours)]
        row += [f"{found.full_evaluations:.1f}", f"{seconds:.0f}"]
        for by, interactions in SOLVED.values():
            levels = programs[by].solved(found.widths.bytes, interactions)
            row.append("the same" if levels == ours else f"{score(levels)}, {programs[by].size(levels):,}")
        if not options.no_repair:
            found, twin, _ = search(model, judged, drop, options.bytes, repair=True)
            assert found.widths is not None
            row += [f"{held.evaluate(twin).value:.2%}", f"{found.widths.bytes:,}"]
        table.add_row(*row)
        console.print(f"drop {drop}: {' '.join(row)}\n{found}")
    console.print(table)


def search(
    model: hs.QuantizedModel, judged: hs.Accuracy, drop: float, counted: Counted, repair: bool
) -> tuple[hs.MixedBitsResult, hs.QuantizedModel, float]:
    """Ours, on a copy of the model; and the seconds that it took."""
    twin, start = copy.deepcopy(model), time.perf_counter()
    found = hs.mixed_bits(twin, judged, drop, hs.MixedBits(BITS, counted, repair=repair))
    return found, twin, time.perf_counter() - start


def assigned(groups: Sequence[Group], levels: Sequence[int]) -> LayerPrecision:
    """The groups at their widths."""
    put = LayerPrecision()
    for group, level in zip(groups, levels, strict=True):
        put = put.with_layers(WIDTHS[BITS[level]].name, group.layers)
    return put


def bytes_of(model: hs.QuantizedModel, groups: Sequence[Group], counted: Counted) -> list[list[int]]:
    """What each group takes at each width."""
    found: list[list[int]] = [[] for _ in groups]
    for level in range(len(BITS)):
        model.choose(assigned(groups, [level] * len(groups)))
        counts = COUNTS[counted](model)
        read = {layer.name: set(layer.sites) & set(counts) for layer in model.layers}
        for sizes, group in zip(found, groups, strict=True):
            sizes.append(sum(counts[name] for name in set().union(*(read[each] for each in group.layers))))
    model.choose(LayerPrecision())
    return found


@dataclass(frozen=True)
class Program:
    """The integer quadratic program.

    Attributes:
        sizes: bytes of each group at each level.
        alone: what the loss rises by with a group at a level, (groups, levels); 0 at the first.
        together: what it rises by with two of them more than with each alone, (groups, levels, groups, levels).
    """

    sizes: list[list[int]]
    alone: np.ndarray
    together: np.ndarray

    @classmethod
    def of(cls, sizes: list[list[int]], losses: np.ndarray) -> Program:
        """From the losses of :func:`lowerings`."""
        base = losses[0]
        alone = np.zeros((len(sizes), len(BITS)))
        together = np.zeros((*alone.shape, *alone.shape))
        for places, loss in zip(lowerings(len(sizes)), losses, strict=True):
            if len(places) == 1:
                alone[places[0]] = loss - base
            elif places:
                a, b = places
                together[a + b] = together[b + a] = loss - base - alone[a] - alone[b]
        return cls(sizes, alone, together)

    def size(self, levels: Sequence[int]) -> int:
        """Bytes of an assignment."""
        return sum(size[level] for size, level in zip(self.sizes, levels, strict=True))

    def solved(self, most: int, interactions: bool) -> list[int]:
        """The levels with the least loss that take at most so many bytes."""
        groups, levels = self.alone.shape
        places = list(itertools.product(range(groups), range(levels)))
        index = {place: i for i, place in enumerate(places)}
        pairs = [
            (a, b)
            for a, b in itertools.combinations(places, 2)
            if interactions and a[0] != b[0] and self.together[a + b] != 0
        ]
        count = len(places) + len(pairs)
        cost = np.array([*(self.alone[place] for place in places), *(self.together[a + b] for a, b in pairs)])
        rows = sparse.lil_matrix((groups + 1 + 3 * len(pairs), count))
        low, high = np.full(rows.shape[0], -np.inf), np.zeros(rows.shape[0])
        for group, level in places:
            rows[group, index[group, level]] = 1
            rows[groups, index[group, level]] = self.sizes[group][level]
        low[:groups] = high[:groups] = 1  # one level each
        high[groups] = most
        for i, (a, b) in enumerate(pairs):  # y <= x_a, y <= x_b, y >= x_a + x_b - 1
            row, y = groups + 1 + 3 * i, len(places) + i
            rows[row, y], rows[row, index[a]] = 1, -1
            rows[row + 1, y], rows[row + 1, index[b]] = 1, -1
            rows[row + 2, index[a]], rows[row + 2, index[b]], rows[row + 2, y] = 1, 1, -1
            high[row + 2] = 1
        integrality = np.array([1] * len(places) + [0] * len(pairs))
        found = milp(
            cost,
            integrality=integrality,
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(rows.tocsr(), low, high),
            options={"time_limit": 300},
        )
        if found.x is None:
            raise SystemExit(f"no assignment within {most:,} bytes: {found.message}")
        return [
            max(range(levels), key=lambda level, group=group: found.x[index[group, level]])
            for group in range(groups)
        ]


def lowerings(groups: int) -> list[tuple[tuple[int, int], ...]]:
    """Nothing lowered, each group to each lower level, and each pair of these: (group, level)."""
    places = list(itertools.product(range(groups), range(1, len(BITS))))
    pairs = [(a, b) for a, b in itertools.combinations(places, 2) if a[0] != b[0]]
    return [(), *((a,) for a in places), *pairs]


def kept(
    file: Path,
    model: hs.QuantizedModel,
    groups: Sequence[Group],
    labelled: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[np.ndarray, float]:
    """The losses of :func:`lowerings`, (losses, assignments), and the seconds that they took; once a network."""
    if not file.exists():
        start = time.perf_counter()
        wires = [wired(model, groups, places) for places in lowerings(len(groups))]
        measured = losses(model, wires, labelled)
        model.choose(LayerPrecision())
        np.savez(file, losses=measured, seconds=time.perf_counter() - start)
    with np.load(file) as found:
        return found["losses"], float(found["seconds"])


def wired(model: hs.QuantizedModel, groups: Sequence[Group], places: Sequence[tuple[int, int]]) -> Wiring:
    """Where the quantizers sit with some groups at a lower level."""
    lowered = dict(places)
    model.choose(assigned(groups, [lowered.get(group, 0) for group in range(len(groups))]))
    return wiring(model)


def losses(
    model: hs.QuantizedModel,
    wires: Sequence[Wiring],
    labelled: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> np.ndarray:
    """The mean cross entropy and divergence of each wiring: from the first one, by redoing what the others change."""
    replay, totals = Replay(model), torch.zeros(len(LOSSES), len(wires), dtype=torch.float64)
    with quantizing(wires):
        for images, labels in labelled:
            wanted = replay.outputs(replay.run(images)).double()
            values = replay.run(images, wires[0])
            for index, each in enumerate(wires):
                changed = {**values, **replay.change(values, wires[0], each)}
                got = replay.outputs(changed).double()
                totals[0, index] += F.cross_entropy(got, labels, reduction="sum")
                totals[1, index] += F.kl_div(
                    got.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="sum"
                )
    return (totals / sum(len(labels) for _, labels in labelled)).numpy()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
