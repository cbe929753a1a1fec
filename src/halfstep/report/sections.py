"""The sections of the page: each takes a run and returns markup, empty where the run has nothing to tell of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from halfstep.evaluate import percent
from halfstep.report.chart import Chart, as_formats_see_it
from halfstep.report.html import Html, escape, figure, number, size, table
from halfstep.report.run import Run

#: What the confidence of the intervals is that of.
CORRECTED = (
    "An interval is widened for the candidates that were examined on the same examples up to its own: it is the "
    "upper ends of all of them that hold together with this confidence, and the lower ends."
)


def summary(run: Run) -> str:
    """Whether the target was met, and the figures that matter."""
    end = run.outcome
    if not end:
        made = figure("evaluations", len(run.evaluations), str(len(run.evaluations)))
        return (
            f"<p class='verdict unmet'>not finished</p><p>{made} evaluations so far. The same command again goes on "
            "from there.</p>"
        )
    rows: list[tuple[str, str | Html]] = [
        (fact.name, figure(fact.key, fact.value, fact.words) if fact.key else fact.words)
        for fact in run.facts()
    ]
    rows.append(("time of evaluations", f"{run.seconds:.1f} s"))
    verdict = ("met", "target met") if end["met"] else ("unmet", "target not met")
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    advice = "".join(f"<li>{escape(sentence)}</li>" for sentence in end.get("advice", ()))
    return f"<p class='verdict {verdict[0]}'>{verdict[1]}</p><dl class='facts'>{facts}</dl>" + (
        f"<h3>What would help</h3><ul>{advice}</ul>" if advice else ""
    )


def ladder(run: Run) -> str:
    """The rungs with their scores and intervals, the decisions, and every evaluation."""
    if not run.steps:
        return ""
    baseline = run.settings["float_score"]
    sign = -1 if run.settings["higher_is_better"] else 1
    worst = baseline + sign * run.settings["max_drop"]
    spots: list[tuple[float, tuple[float, float] | None, str]] = [(baseline, None, "float")]
    for step in run.steps:
        ends = (
            None if step["low"] is None else (baseline + sign * step["low"], baseline + sign * step["high"])
        )
        spots.append((step["score"], ends, step["rung"]))
    if run.outcome:
        spots.append((run.outcome["deployed_score"], None, "deployed file"))
    heights = [
        worst,
        *(score for score, _, _ in spots),
        *(end for _, pair, _ in spots if pair for end in pair),
    ]
    chart = Chart("score of each rung", "", "score", (0, len(spots) - 1), (min(heights), max(heights)))
    chart.level(worst, "needed", "needed")
    chart.line([(x, score) for x, (score, _, _) in enumerate(spots)], "path")
    for x, (score, pair, name) in enumerate(spots):
        if pair:
            chart.upright(x, *pair, "interval")
        chart.dot((x, score), "spot", f"{name}: {score:.4f}")
    rows = [
        (
            step["rung"],
            figure(f"step {step['rung']}", step["score"], f"{step['score']:.4f}"),
            f"{step['drop']:+.4f}",
            "–" if step["low"] is None else f"{step['low']:+.4f} to {step['high']:+.4f}",
            step["examined"],
            _file_of(step),
            len(step["float_layers"]),
            f"{step['cost']:.3g}",
            f"{step['measured']['seconds']:.1f}",
            "yes" if step["met"] else "no",
        )
        for step in run.steps
    ]
    interval = f"{percent(run.settings['confidence'])} interval"
    about = ("float layers", "evaluations", "seconds", "met")
    headers = ("rung", "score", "drop", interval, "candidate", "its file", *about)
    decisions = "".join(f"<li>{escape(sentence)}</li>" for sentence in run.decisions)
    return (
        chart.svg([(x, name) for x, (_, _, name) in enumerate(spots)])
        + table(headers, rows, range(1, 9), "rungs")
        + f"<p>{CORRECTED}</p>"
        + _metrics(run)
        + f"<h3>Decisions</h3><ol>{decisions}</ol>"
        + _evaluations(run)
    )


def _file_of(step: dict[str, Any]) -> str | Html:
    """The score of a rung's file, where it was run to see whether to climb on."""
    score = step["file_score"]
    return "–" if score is None else figure(f"file of {step['rung']}", score, f"{score:.4f}")


def _metrics(run: Run) -> str:
    """Of several metrics, how each stands after each rung."""
    rows = [
        (
            step["rung"],
            metric["metric"],
            figure(f"step {step['rung']} {metric['metric']}", metric["score"], f"{metric['score']:.4f}"),
            f"{metric['drop']:+.4f}",
            "–" if metric["low"] is None else f"{metric['low']:+.4f} to {metric['high']:+.4f}",
            f"{metric['max_drop']:g}",
            "yes" if metric["met"] else "no",
        )
        for step in run.steps
        for metric in step["metrics"]
        if metric["metric"]
    ]
    interval = f"{percent(run.settings['confidence'])} interval"
    headers = ("rung", "metric", "score", "drop", interval, "allowed", "met")
    return table(headers, rows, range(2, 6), "every metric") if rows else ""


def _evaluations(run: Run) -> str:
    rows = [
        (
            index,
            made.rung,
            made.what,
            figure(f"evaluation {index}", made.score, f"{made.score:.4f}"),
            "–" if made.examples is None else f"{made.examples:,}",
            f"{made.seconds:.2f}",
        )
        for index, made in enumerate(run.evaluations)
    ]
    headers = ("", "rung", "candidate", "score", "examples", "seconds")
    return (
        f"<details><summary>All {len(rows)} evaluations</summary>"
        f"{table(headers, rows, (0, 3, 4, 5), 'evaluations')}</details>"
    )


def tradeoff(run: Run) -> str:
    """Score against size and latency; the line joins what no other file beats."""
    points = run.outcome.get("measured", {}).get("files", [])
    if not points:
        return ""
    better = 1 if run.settings["higher_is_better"] else -1
    charts = []
    for key, label, unit in (("bytes", "size, KiB", 1024), ("ms", "latency of a batch, ms", 1)):
        xs, ys = [p[key] / unit for p in points], [p["score"] for p in points]
        chart = Chart(
            f"score against {label}", label, "score", (min(0.0, *xs), max(xs)), (min(ys), max(ys)), 520, 300
        )
        front = sorted(
            (x, y)
            for x, y in zip(xs, ys, strict=True)
            if not any(
                a <= x and better * b >= better * y and (a, b) != (x, y) for a, b in zip(xs, ys, strict=True)
            )
        )
        chart.line(front, "front")
        for index, (point, x, y) in enumerate(zip(points, xs, ys, strict=True)):
            style = "spot" if (x, y) in front else "spot beaten"
            hint = f"{point['name']}: {y:.4f}, {x:.4g} {label}"
            chart.dot((x, y), style, hint, point["name"], below=index % 2 == 1)
        charts.append(f"<figure>{chart.svg()}</figure>")
    rows = [
        (
            p["name"],
            figure(f"file {p['name']}", p["score"], f"{p['score']:.4f}"),
            size(p["bytes"]),
            f"{p['ms']:.3f}",
            f"{p['speedup']:.2f}",
        )
        for p in points
    ]
    return f"<div class='pair'>{''.join(charts)}</div>" + table(
        ("file", "score", "size", "ms", "speed over float"), rows, range(1, 5), "files"
    )


def calibrators(run: Run) -> str:
    """What every calibrator does to the outputs, and to the metric where it was asked."""
    rows = [
        (
            row["activations"],
            row["weights"],
            figure(f"kl {index}", row["kl"], number(row["kl"], 3)),
            number(row["sqnr"], 3),
            "–" if row["score"] is None else f"{row['score']:.4f}",
        )
        for index, row in enumerate(run.sweep)
    ]
    headers = ("activations", "weights", "KL of the outputs", "SQNR, dB", "score")
    return table(headers, rows, (2, 3, 4), "calibrators, best first") if rows else ""


def picture(run: Run) -> str:
    """An input as each format sees it."""
    if run.picture is None:
        return ""
    figures = "".join(
        f"<figure class='seen'><img alt='the input in {escape(name)}' src='{address}'><figcaption>{escape(name)}"
        f"<br><small>{escape(words)}</small></figcaption></figure>"
        for name, words, address in as_formats_see_it(run.picture)
    )
    return f"<div class='row'>{figures}</div>"


def sites(run: Run) -> str:
    """The site picker; the page's script fills it."""
    if not run.sites:
        return ""
    some = ""
    if len(run.sites) < run.known_sites:
        some = (
            f"<p>{len(run.sites):,} of {run.known_sites:,} sites are shown, taken evenly from activations and weights "
            "alike.</p>"
        )
    return (
        f"{some}<p>Type to search; arrow keys choose. "
        "Bars count values on a logarithmic scale; the shaded range is what the "
        "format represents, with its steps where they can be told apart; lines are other calibrators' ranges.</p>"
        "<div class='picker'><div><label for='search'>Search sites</label>"
        "<input id='search' type='search' autocomplete='off' placeholder='name, layer or format'>"
        f"<label for='list'>Sites (<span id='found'>{len(run.sites)}</span> of {len(run.sites)})</label>"
        "<select id='list' size='10'></select></div>"
        "<div id='site' aria-live='polite'></div></div>"
    )


def sensitivity(run: Run) -> str:
    """What each group of layers alone costs, most sensitive first, with those left in float."""
    found = run.findings.get("sensitivity")
    if not found:
        return ""
    left = set(run.outcome.get("float_layers", ()))
    top = max((row["score"] or 0.0 for row in found["rows"]), default=0.0) or 1.0
    bars = []
    for row in found["rows"]:
        name = ", ".join(row["layers"])
        floating = left.issuperset(row["layers"])
        share = max(0.0, min(1.0, (row["score"] or 0.0) / top))
        exact = number(row["score"], 3)
        shown = figure(f"sensitivity {name}", row["score"], exact) if row["score"] is not None else exact
        measured = "" if row["drop"] is None else f"measured drop {row['drop']:+.4f}"
        bars.append(
            f"<tr class='{'floating' if floating else ''}'><th scope='row'>{escape(name)}</th>"
            f"<td class='bar'><span style='width:{share:.2%}'></span></td><td class='number'>{shown}</td>"
            f"<td>{'left in float' if floating else ''} {measured}</td></tr>"
        )
    tau = "" if found["tau"] is None else f" Kendall's tau with the measured drops is {found['tau']:+.2f}."
    return (
        f"<p>What quantizing each group of layers alone loses: {escape(found['method'])}, in {escape(found['unit'])}."
        f"{tau}</p><div class='scroll' tabindex='0'><table class='bars'><tbody>{''.join(bars)}</tbody></table></div>"
    )


def widths(run: Run) -> str:
    """The bits of each group's weights, with what they take and lose at every width."""
    found = run.findings.get("widths")
    if not found:
        return ""
    rows = []
    for row in found["rows"]:
        name = ", ".join(row["layers"])
        cells: list[str | Html] = [name, figure(f"bits {name}", row["bits"], str(row["bits"]))]
        for count, loss in zip(row["bytes"], row["losses"], strict=True):
            cells += [f"{count:,}", number(loss, 3)]
        rows.append(cells)
    headers = [
        "layers",
        "bits",
        *(f"{what} at {bits}" for bits in found["widths"] for what in ("bytes", "loss")),
    ]
    counted = "as the file stores them" if found["counted"] == "stored" else "if every bit is stored as one"
    return (
        f"<p>Bits of the weights, the bytes that they take at each width, {counted}, and what that alone loses in the "
        f"outputs: {escape(found['method'])}.</p>{table(headers, rows, range(1, len(headers)))}"
    )


def layers(run: Run) -> str:
    """Every layer: bits, noise, and whether it is integer, or why not."""
    if not run.outcome:
        return ""
    by_layer: dict[str, dict[bool, dict[str, object]]] = {}
    for site in run.sites:
        for layer in site["layers"]:
            by_layer.setdefault(layer, {}).setdefault(site["weight"], site)
    times = run.outcome["measured"]["microseconds"]
    rows = []
    for layer in run.outcome["layers"]:
        found = by_layer.get(layer["name"], {})
        weight, activation = found.get(True, {}), found.get(False, {})
        rows.append(
            (
                layer["name"],
                layer["kind"],
                weight.get("bits", "–"),
                activation.get("bits", "–"),
                number(weight.get("sqnr"), 3),  # type: ignore[arg-type]
                number(activation.get("sqnr"), 3),  # type: ignore[arg-type]
                _time(layer["name"], times),
                "integers" if layer["integer"] else "float",
                layer["reason"],
            )
        )
    for op in run.outcome["float_operators"]:
        rows.append(
            (op["name"], op["kind"], "–", "–", "–", "–", _time(op["name"], times), "float", op["reason"])
        )
    headers = (
        "layer",
        "kind",
        "weight bits",
        "input bits",
        "weight dB",
        "input dB",
        "µs",
        "runs in",
        "reason",
    )
    told = "layers; µs of a batch, measured layer by layer" if times else "layers"
    return table(headers, rows, (2, 3, 4, 5, 6), told)


def _time(name: str, times: dict[str, float]) -> str | Html:
    return figure(f"µs {name}", times[name], f"{times[name]:.0f}") if name in times else "–"


def training(run: Run) -> str:
    """Loss and score over the steps of the fine-tuning."""
    found = run.findings.get("training")
    if not found or not found["losses"]:
        return ""
    losses, marks, every = found["losses"], found["marks"], found["every"]
    points = [(index * every, loss) for index, loss in enumerate(losses)]
    chart = Chart("training loss", "step", "loss", (0, points[-1][0]), (min(losses), max(losses)), 520, 300)
    chart.line(points, "path")
    parts = [f"<figure>{chart.svg()}</figure>"]
    if marks:
        scores = [mark["score"] for mark in marks] + [run.settings["float_score"]]
        chart = Chart(
            "score while training",
            "step",
            "score",
            (0, marks[-1]["step"]),
            (min(scores), max(scores)),
            520,
            300,
        )
        chart.level(run.settings["float_score"], "float", "needed")
        chart.line([(mark["step"], mark["score"]) for mark in marks], "path")
        for mark in marks:
            chart.dot((mark["step"], mark["score"]), "spot", f"step {mark['step']}: {mark['score']:.4f}")
        parts.append(f"<figure>{chart.svg()}</figure>")
    kept = f"<p>Step {found['best_step']} of {found['planned']} was kept.</p>"
    return f"<div class='pair'>{''.join(parts)}</div>{kept}"


def reproduce(run: Run) -> str:
    """What was asked, as it would be asked again."""
    if not run.settings:
        return ""
    rows = [(name, value) for name, value in run.settings.items() if name not in ("command", "float_score")]
    command = run.settings.get("command")
    code = f"<pre tabindex='0'><code>{escape(command)}</code></pre>" if command else ""
    return code + table(("setting", "value"), rows, (), "settings, defaults resolved")


def environment(run: Run) -> str:
    """Where it ran."""
    return table(("what", "version"), run.environment.items(), (), "environment") if run.environment else ""


#: Every section: its address, its title, what makes it.
SECTIONS: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("summary", "Summary", summary),
    ("ladder", "The ladder", ladder),
    ("tradeoff", "Score, size and latency", tradeoff),
    ("calibrators", "Calibrators", calibrators),
    ("picture", "An input as each format sees it", picture),
    ("sites", "Histograms", sites),
    ("sensitivity", "Sensitivity", sensitivity),
    ("widths", "Bits per layer", widths),
    ("layers", "Layers", layers),
    ("training", "Training", training),
    ("reproduce", "To do it again", reproduce),
    ("environment", "Environment", environment),
)
