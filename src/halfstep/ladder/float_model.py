"""What metrics that need no labels learn from the float model before anything is scored."""

from __future__ import annotations

from halfstep.evaluate import AgainstFloat, Scorer, against, parts
from halfstep.fake_quantize import Mode
from halfstep.model import QuantizedModel
from halfstep.progress import steps


def knowing_float(scorer: Scorer, model: QuantizedModel) -> Scorer:
    """``scorer`` with the float model's answers, where it compares with them and has none yet.

    One pass, made before training or anything else could change the parameters.

    Args:
        scorer: the metric.
        model: in whatever mode; its float network, as it was handed over, answers.

    Raises:
        MetricError: if an answer is none that can be compared with.
        DataError: naming the batch, if the model does not take its inputs.
    """
    if not any(isinstance(part, AgainstFloat) and part.place is None for part in parts(scorer).values()):
        return scorer
    with model.using(Mode.FLOAT), steps("asking the float model for its answers"):
        return against(scorer, model.handed_over)
