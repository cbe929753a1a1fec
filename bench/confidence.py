"""What halfstep says about confidence, held against simulation: how often it is wrong, and what it costs.

Scores are drawn, no network is run. A candidate's discordant examples (right in float, wrong in the candidate, or the
other way round) are partly those of the candidate that it is a change of.

python -m bench.confidence                       # all tables: a quarter of an hour of one core
python -m bench.confidence --runs 200 --tables strict,price
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from halfstep.evaluate import Score, SequentialTest, paired_drop, share_of_error
from halfstep.evaluate.paired import bootstrap_interval
from halfstep.ladder.goal import Goal

CONFIDENCE, ALLOWED = 0.95, 0.01
NUMBERS = (1, 5, 10, 20, 40)
#: Candidates of a climb whose rungs begin with the best so far: calibrations, repairs, partial quantization, training.
CLIMB = (3, 1, 16, 20)
BOUNDS = (0.0, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000, help="simulated searches or samples a row")
    parser.add_argument("--tables", default=",".join(TABLES), help="in this order")
    options = parser.parse_args()
    console = Console(width=130)
    for name in options.tables.split(","):
        console.print(TABLES[name](options.runs))


class Examples:
    """Labelled examples of which the float model gets half right, and candidates of a known true drop on them.

    Args:
        count: examples.
        lost: the share of all examples that a candidate loses on average.
        won: the share that it wins.
    """

    def __init__(self, count: int, lost: float, won: float, generator: torch.Generator) -> None:
        self.generator = generator
        self.right = self._draw(count) < 0.5
        self.rate = torch.where(self.right, 2 * lost, 2 * won)  # that an example becomes discordant
        self.float_score = Score.mean(self.right.double())

    def network(self) -> Tensor:
        """The discordant examples of a network, (count,) bool."""
        return self._draw(len(self.rate)) < self.rate

    def changed(self, network: Tensor, share: float) -> Tensor:
        """Those of a network that is a change of ``network``, of whose discordant examples it keeps a share."""
        fresh = self.rate * (1 - share) / (1 - self.rate * share)
        kept = network & (self._draw(len(network)) < share)
        return kept | (self._draw(len(network)) < fresh)

    def score(self, network: Tensor) -> Score:
        return Score.mean((self.right ^ network).double())

    def _draw(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator)


def changes_of_one(examples: Examples, share: float) -> Iterator[Score]:
    """Forty changes of one network: what is tried does not depend on what scored well."""
    network = examples.network()
    for _ in range(max(NUMBERS)):
        yield examples.score(examples.changed(network, share))


def changes_of_the_best(examples: Examples, share: float) -> Iterator[Score]:
    """As in a climb: each rung's candidates are changes of the best one before it."""
    best, luck = examples.network(), -math.inf
    for rung in CLIMB:
        parent = best
        for _ in range(rung):
            network = examples.changed(parent, share)
            score = examples.score(network)
            if score.value > luck:
                best, luck = network, score.value
            yield score


Rule = Callable[[Goal, Score, int], bool]
RULES: dict[str, tuple[bool, Rule]] = {
    "each its own interval": (True, lambda goal, score, _: goal.met(score)),
    "its share of the error": (True, lambda goal, score, number: goal.met(score.numbered(number))),
    "not strict": (False, lambda goal, score, number: goal.met(score.numbered(number))),
}


def wrong_acceptances(
    runs: int, strict: bool, true_drop: float, count: int, won: float = 0.02, seed: int = 0
) -> Table:
    """How many searches accept a network that loses at least what is allowed, by the candidates looked at."""
    table = Table(
        title=f"searches that accept a network with a true drop of {true_drop:g}, allowed {ALLOWED:g}; {count:,} "
        f"examples, {true_drop + 2 * won:.1%} discordant, {runs} searches"
    )
    for column in ("rule", "candidates", "shared", *(f"after {number}" for number in NUMBERS)):
        table.add_column(column)
    sources = {"changes of one network": changes_of_one, "changes of the best so far": changes_of_the_best}
    for words, source in sources.items():
        for share in (0.5, 0.8, 0.95):
            generator = torch.Generator().manual_seed(seed)
            rules = {name: rule for name, (is_strict, rule) in RULES.items() if is_strict == strict}
            firsts: dict[str, list[float]] = {name: [] for name in rules}
            for _ in range(runs):
                examples = Examples(count, true_drop + won, won, generator)
                goal = Goal(ALLOWED, examples.float_score, True, CONFIDENCE, strict, BOUNDS)
                waiting = dict(rules)
                for number, score in enumerate(source(examples, share), 1):
                    for name in [name for name, rule in waiting.items() if rule(goal, score, number)]:
                        firsts[name].append(number)
                        del waiting[name]
                    if not waiting:
                        break
            for name, first in firsts.items():
                rates = [f"{sum(each <= number for each in first) / runs:.1%}" for number in NUMBERS]
                table.add_row(name, words, f"{share:.0%}", *rates)
    return table


def price(runs: int, discordant: float = 0.02) -> Table:
    """How many examples a strict goal takes to accept a network that is good enough, by its number."""
    table = Table(
        title=f"examples with which a strict goal accepts, allowed {ALLOWED:g}, {discordant:.0%} discordant"
    )
    for column in ("true drop", "accepted", *(f"candidate {number}" for number in NUMBERS)):
        table.add_column(column, justify="right")
    for true_drop in (0.0, ALLOWED / 2):
        for share, deviations in (("in half of all cases", 0.0), ("in nine of ten", 1.2816)):
            needed = [f"{examples_needed(true_drop, discordant, number, deviations):,}" for number in NUMBERS]
            table.add_row(f"{true_drop:g}", share, *needed)
    return table


def examples_needed(true_drop: float, discordant: float, number: int, deviations: float) -> int:
    """The fewest examples, to three digits, with which the drop that chance shows so far above the true one is met."""

    def met(count: int) -> bool:
        shown = true_drop + deviations * math.sqrt((discordant - true_drop**2) / count)
        lost = round(count * (discordant + shown) / 2)
        won = max(0, round(count * (discordant - shown) / 2))
        hits = torch.ones(2, count, dtype=torch.float64)
        hits[0, :won], hits[1, won : won + lost] = 0, 0
        reference, candidate = (Score.mean(hit) for hit in hits)
        return Goal(ALLOWED, reference, True, CONFIDENCE, True, BOUNDS).met(candidate.numbered(number))

    low, high = 100, 200
    while not met(high):
        low, high = high, 2 * high
    while high - low > low / 500:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle, high)
    return int(float(f"{high:.3g}"))


def coverage(runs: int) -> Table:
    """How often the upper end of a 95% interval lies below the true drop, and how far above the drop it is."""
    runs = max(1, runs // 4)
    samples: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
        "2% lose all": (lambda u, v: (u < 0.02).double(), 0.02),
        "0.2% lose all": (lambda u, v: (u < 0.002).double(), 0.002),
        "2% lose half or all": (lambda u, v: (u < 0.02) * torch.where(v < 0.5, 0.5, 1.0), 0.015),
        "0.2% lose all, the others +-0.001": (lambda u, v: (u < 0.002) + 0.002 * (v - 0.5), 0.002),
        "5% lose -0.5 to 1": (lambda u, v: (u < 0.05) * (1.5 * v - 0.5), 0.0125),
        "all lose, squares": (lambda u, v: 0.1 * v * v, 0.1 / 3),
        "all lose, normal, deviation 0.05": (lambda u, v: 0.01 + 0.05 * torch.special.ndtri(v), 0.01),
    }
    table = Table(
        title=f"upper ends of 95% intervals below the truth (at most 2.5%) | above the drop; {runs} samples"
    )
    for column in ("differences", "examples", "bounds 0 and 1", "without bounds", "resampling alone"):
        table.add_column(column)
    for words, (make, truth) in samples.items():
        for count in (50, 200, 1000):
            generator = torch.Generator().manual_seed(0)
            drops: list[list[tuple[float, float]]] = [[], [], []]  # (upper end, drop) of each way
            for _ in range(runs):
                lost = make(*torch.rand(2, count, generator=generator, dtype=torch.float64))
                reference, candidate = Score.mean(torch.ones_like(lost)), Score.mean(1 - lost)
                if set(lost.tolist()) <= {0.0, 1.0}:
                    bounded = paired_drop(reference, candidate, bounds=BOUNDS).high
                else:  # the candidate may be better, too: differences go from -1 to 1
                    bounded = bootstrap_interval(lost, CONFIDENCE, (-1.0, 1.0))[1]
                highs = (
                    bounded,
                    paired_drop(reference, candidate).high,
                    bootstrap_interval(lost, CONFIDENCE)[1],
                )
                for found, high in zip(drops, highs, strict=True):
                    if high is not None:
                        found.append((high, float(lost.mean())))
            cells = []
            for found in drops:
                below = sum(high < truth for high, _ in found) / runs
                width = sum(high - drop for high, drop in found) / max(1, len(found))
                none = f" | none of {1 - len(found) / runs:.0%}" if len(found) < runs else ""
                cells.append(f"{below:.1%} | {width:.4f}{none}" if found else "none")
            table.add_row(words, f"{count:,}", *cells)
    return table


def early_verdicts(runs: int, count: int = 1000, candidates: int = 20) -> Table:
    """Searches in which an early verdict refuses a candidate that just meets the goal on all examples."""
    runs = max(1, runs // 5)
    table = Table(
        title=f"{candidates} candidates that just meet the goal ({count:,} examples), {runs} searches, refused early"
    )
    for column in ("discordant examples shared", "single", "at least one", "single, final", "one, final"):
        table.add_column(column)
    common, own = round(count * (ALLOWED + 0.02)), round(count * 0.02)
    for share in (0.0, 0.5, 0.9):
        generator = torch.Generator().manual_seed(0)
        refused = {False: torch.zeros(runs, candidates), True: torch.zeros(runs, candidates)}
        for run in range(runs):
            places = torch.randperm(count, generator=generator)
            for number in range(1, candidates + 1):
                kept, kept_won = round(share * common), round(share * own)
                rest = places[kept + kept_won :]
                rest = rest[torch.randperm(len(rest), generator=generator)]
                values = torch.zeros(count, dtype=torch.float64)
                values[places[:kept]], values[places[kept : kept + kept_won]] = 1, -1
                values[rest[: common - kept]] = 1
                values[rest[common - kept : common - kept + own - kept_won]] = -1
                for final in refused:
                    level = share_of_error(1 - CONFIDENCE, number) if final else 1 - CONFIDENCE
                    test = SequentialTest(ALLOWED, -1.0, 1.0, level, total=count)
                    side = next((side for part in values.split(64) if (side := test.update(part))), None)
                    refused[final][run, number - 1] = side == "above"
        cells = []
        for found in refused.values():
            cells += [f"{float(found.mean()):.1%}", f"{float(found.any(1).double().mean()):.1%}"]
        table.add_row(f"{share:.0%}", *cells)
    return table


TABLES: dict[str, Callable[[int], Table]] = {
    "strict": lambda runs: wrong_acceptances(runs, True, ALLOWED, 2000),
    "loose": lambda runs: wrong_acceptances(runs, False, 1.5 * ALLOWED, 1000),
    "price": price,
    "coverage": coverage,
    "early": early_verdicts,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    main()
