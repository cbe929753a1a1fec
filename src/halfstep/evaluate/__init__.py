"""From a model to a score, and from two scores to the drop between them, with what is certain about it."""

from halfstep.evaluate.against_float import SQNR, AgainstFloat, Agreement, Cosine, class_axis
from halfstep.evaluate.early import EarlyStopping, SequentialTest, early_stopping
from halfstep.evaluate.metric import Accuracy, CallableMetric, Metric, as_scorer, logits_of
from halfstep.evaluate.paired import Drop, paired_drop, percent, share_of_error
from halfstep.evaluate.resampling import Resampled
from halfstep.evaluate.score import DataMetric, Score, Scorer
from halfstep.evaluate.set_metric import SetMetric
from halfstep.evaluate.several import Several, against, as_scorers, classifies, labelled_data, parts

__all__ = [
    "SQNR",
    "Accuracy",
    "AgainstFloat",
    "Agreement",
    "CallableMetric",
    "Cosine",
    "DataMetric",
    "Drop",
    "EarlyStopping",
    "Metric",
    "Resampled",
    "Score",
    "Scorer",
    "SequentialTest",
    "SetMetric",
    "Several",
    "against",
    "as_scorer",
    "as_scorers",
    "class_axis",
    "classifies",
    "early_stopping",
    "labelled_data",
    "logits_of",
    "paired_drop",
    "parts",
    "percent",
    "share_of_error",
]
