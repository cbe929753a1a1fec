"""From a model to a score, and from two scores to the drop between them, with what is certain about it."""

from halfstep.evaluate.early import EarlyStopping, early_stopping
from halfstep.evaluate.metric import Accuracy, CallableMetric, Metric, as_scorer, logits_of
from halfstep.evaluate.paired import Drop, paired_drop
from halfstep.evaluate.score import Score, Scorer
from halfstep.evaluate.sequential import SequentialTest

__all__ = [
    "Accuracy",
    "CallableMetric",
    "Drop",
    "EarlyStopping",
    "Metric",
    "Score",
    "Scorer",
    "SequentialTest",
    "as_scorer",
    "early_stopping",
    "logits_of",
    "paired_drop",
]
