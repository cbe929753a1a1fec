"""What a run's directory is about: claimed when it begins, compared when it goes on."""

from __future__ import annotations

from halfstep.evaluate import Scorer, labelled_data
from halfstep.ladder.aim import Aim
from halfstep.ladder.environment import environment
from halfstep.ladder.identity import Examples, metric_digest, model_digest
from halfstep.ladder.journal import Journal
from halfstep.model import QuantizedModel


def claim(journal: Journal, prepared: QuantizedModel, scorer: Scorer, aim: Aim) -> Examples:
    """Make the directory this run's own, or see that it is; the examples that the metric judges on.

    Raises:
        RunError: if the directory belongs to a run with another model, recipe, target, metric or data.
    """
    journal.claim("model", model_digest(prepared.captured))
    journal.claim("recipe", repr(prepared.recipe))
    journal.claim("configuration", f"target {prepared.target.name}, {aim}")
    journal.claim("metric", metric_digest(scorer))
    judged = Examples()
    labelled = labelled_data(scorer)
    for batches in labelled:
        for item in batches:
            if isinstance(item, (tuple, list)) and len(item) == 2:  # anything else is the metric's to refuse
                judged.add(*item)
    if labelled:
        journal.claim("labelled data", judged.digest())
    journal.write("environment", packages=environment())
    return judged
