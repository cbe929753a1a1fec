"""Calibrators: which range a format shall cover, asked of a histogram or of a weight."""

from halfstep.calibrators.calibrator import Calibrator, WeightCalibrator, range_of
from halfstep.calibrators.concerns import Concern, data_concerns, disagreements, lost, unlike, unsteady
from halfstep.calibrators.entropy import Entropy
from halfstep.calibrators.fitted import fitted_codebook
from halfstep.calibrators.maximum import Max
from halfstep.calibrators.moving_average import MovingAverage
from halfstep.calibrators.mse import MSE
from halfstep.calibrators.percentile import Percentile
from halfstep.calibrators.placed import levels

__all__ = [
    "MSE",
    "Calibrator",
    "Concern",
    "Entropy",
    "Max",
    "MovingAverage",
    "Percentile",
    "WeightCalibrator",
    "data_concerns",
    "disagreements",
    "fitted_codebook",
    "levels",
    "lost",
    "range_of",
    "unlike",
    "unsteady",
]
