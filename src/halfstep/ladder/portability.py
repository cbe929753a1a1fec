"""Whether weights have 7 bits where sums could saturate: settled at a run's beginning, and said."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from halfstep.graph.place import place
from halfstep.journal import Entry
from halfstep.ladder.search import Search
from halfstep.recipe import Recipe
from halfstep.runtime.saturation import saturates_here
from halfstep.targets import Target

#: The entry of the journal that says how a recipe's ``portable`` was settled where the recipe leaves it open.
PORTABLE = "portable"


def settle(recipe: Recipe, target: Target, entries: Iterable[Entry] = ()) -> Recipe:
    """The recipe with ``portable`` said: as the run with these entries has it, else as this processor needs it."""
    if recipe.portable is not None:
        return recipe
    known = [entry.data["portable"] for entry in entries if entry.kind == PORTABLE]
    return replace(recipe, portable=known[-1] if known else target.pair_sums and saturates_here())


def narrower_weights(search: Search) -> str:
    """Which weights have fewer bits than asked for, and why, in a sentence; empty if none has, or it was asked for."""
    model = search.model
    if not (search.journal.of(PORTABLE) and model.recipe.portable):
        return ""
    asked = place(model.graph, model.target, replace(model.recipe, portable=False), model.choices)
    formats = {site.name: site.format for site in asked.sites if site.is_weight}
    narrower = [
        site for site in model.placement.sites if site.is_weight and site.format != formats[site.name]
    ]
    if not narrower:
        return ""
    return (
        f"{len(narrower)} of {len(formats)} weights have {narrower[0].format.bits} bits instead of "
        f"{formats[narrower[0].name].bits}: where this run began, integer kernels add products in 16 bits, which would "
        "saturate (an x86 processor without VNNI). portable=True asks for this on every processor, so that the file "
        "answers alike on all of them; portable=False keeps the bits"
    )
