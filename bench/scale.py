"""Calibration and sensitivity on several ranks: how much faster, how evenly shared, and how many bytes are sent.

Rank 0 does each piece of work by itself and with the others, in turns, in one run; every rank computes on one thread.
Wall time says what a quiet machine makes of it. Processor time says how the work is shared whatever else is running:
what one process takes over what the busiest rank takes.

python -m bench.scale                  # the small ResNet, 2 ranks
python -m bench.scale --ranks 1 --rounds 1
"""

from __future__ import annotations

import argparse
import contextvars
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import halfstep as hs
from bench.networks.resnet import ResNet18, SmallResNet, randomize_batch_norm
from halfstep.distributed import Crew, crew, together
from halfstep.evaluate import as_scorers
from halfstep.ladder.beginning import _observed
from halfstep.ladder.ranks import agree, follow
from halfstep.model import QuantizedModel
from halfstep.ranges import activation_sites

NETWORKS = {"resnet": (SmallResNet, (1, 28, 28)), "resnet18": (ResNet18, (3, 224, 224))}


def work(q: QuantizedModel, batches: list[torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """What is shared, by name."""

    return {
        "calibration": lambda: together(_calibration, q, batches),
        "sensitivity, one layer quantized (kl)": lambda: hs.sensitivity(q, "kl"),
        "sensitivity, one layer in float (spared_kl)": lambda: hs.sensitivity(q, "spared_kl"),
        "calibrators compared (best_of)": lambda: hs.calibrate(q, hs.best_of()),
    }


def _calibration(q: QuantizedModel, batches: list[torch.Tensor]) -> None:
    for module in activation_sites(q).values():
        module.forget()
    q.sample.clear()
    _observed(q, batches)


def busy(ranks: Crew) -> list[float]:
    """Processor seconds of every rank so far."""
    return together(_processor_times)


def _processor_times() -> list[float]:
    from halfstep.distributed import share

    return share().gather(time.process_time(), "processor times")


def sent(ranks: Crew) -> Counter[str]:
    """Bytes sent by all ranks so far, by what they were."""
    return sum(together(_bytes), Counter())


def _bytes() -> list[Counter[str]]:
    from halfstep.distributed import current, share

    found = current()
    own = Counter(found.ranks.sent) if found is not None and found.ranks is not None else Counter()
    return share().gather(own, "bytes")


def rank(number: int, options: argparse.Namespace, place: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.ranks > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{place}/meet", rank=number, world_size=options.ranks
        )
    kind, shape = NETWORKS[options.network]
    generator = torch.Generator().manual_seed(0)
    batches = list(torch.randn(options.images, *shape, generator=generator).split(options.batch))
    torch.manual_seed(0)
    q = hs.prepare(randomize_batch_norm(kind()).eval(), batches[0][:4])
    scorer = as_scorers(hs.Metric(batches[:1], lambda outputs, labels: outputs[:, 0]))
    with crew() as ranks:
        if ranks.leads:
            agree(ranks, q, scorer, batches, None)
            measure(ranks, q, batches, options)
            ranks.end(None)
        else:
            follow(ranks, q, scorer, batches, None)
    if options.ranks > 1:
        torch.distributed.destroy_process_group()


def measure(ranks: Crew, q: QuantizedModel, batches: list[torch.Tensor], options: argparse.Namespace) -> None:
    console = Console(width=150)
    table = Table(
        title=f"{options.network}, {options.images} images in batches of {options.batch}, "
        f"{len(activation_sites(q))} sites, {options.ranks} ranks of one thread, {options.rounds} rounds in turns"
    )
    for column in ("work", "alone, s", "shared, s", "faster", "alone, cpu s", "busiest rank, cpu s", "shares, %",
                   "faster by cpu", "bytes sent"):  # fmt: skip
        table.add_column(column, justify="left" if column == "work" else "right")
    for name, piece in work(q, batches).items():
        if not any(name.startswith(wanted) for wanted in options.work):
            continue
        alone, shared, rows = [], [], []
        for _ in range(options.rounds):
            start, cpu = time.perf_counter(), time.process_time()
            contextvars.Context().run(piece)  # an empty context has no crew
            alone.append((time.perf_counter() - start, time.process_time() - cpu))
            before, told = busy(ranks), sent(ranks)
            start = time.perf_counter()
            piece()
            shared.append(time.perf_counter() - start)
            parts = [after - earlier for earlier, after in zip(before, busy(ranks), strict=True)]
            rows.append((parts, sent(ranks) - told))
        if name == "calibration":
            hs.calibrate(q)
        wall, cpu = (statistics.median(column) for column in zip(*alone, strict=True))
        parts = [statistics.median(column) for column in zip(*(parts for parts, _ in rows), strict=True)]
        together_wall, busiest = statistics.median(shared), max(parts)
        counted = Counter(
            {what: size for what, size in rows[-1][1].items() if what not in ("bytes", "processor times")}
        )
        table.add_row(
            name, f"{wall:.2f}", f"{together_wall:.2f}", f"{wall / together_wall:.2f}", f"{cpu:.2f}",
            f"{busiest:.2f}", " / ".join(f"{100 * part / sum(parts):.0f}" for part in parts),
            f"{cpu / busiest:.2f}", ", ".join(f"{what} {size:,}" for what, size in counted.most_common()),
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="resnet")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--work", nargs="+", default=[""], help="calibration first, then others by how they begin"
    )
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if options.ranks == 1:
            rank(0, options, place)
        else:
            torch.multiprocessing.spawn(rank, (options, place), nprocs=options.ranks)


if __name__ == "__main__":
    main()
