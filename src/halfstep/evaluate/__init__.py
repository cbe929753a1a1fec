"""From a model to a score, and from two scores to the drop between them, with what is certain about it."""

from halfstep.evaluate.early import EarlyStopping, early_stopping
from halfstep.evaluate.metric import Accuracy, CallableMetric, Metric, as_scorer, logits_of
from halfstep.evaluate.paired import Drop, paired_drop, percent, share_of_error
from halfstep.evaluate.score import Score, Scorer
from halfstep.evaluate.sequential import SequentialTest
from halfstep.evaluate.several import Several, as_scorers, classifies, labelled_data, parts

__all__ = [
    "Accuracy",
    "CallableMetric",
    "Drop",
    "EarlyStopping",
    "Metric",
    "Score",
    "Scorer",
    "SequentialTest",
    "Several",
    "as_scorer",
    "as_scorers",
    "classifies",
    "early_stopping",
    "labelled_data",
    "logits_of",
    "paired_drop",
    "parts",
    "percent",
    "share_of_error",
]
