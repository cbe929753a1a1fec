"""Calibrators: which range a format shall cover, asked of a histogram or of a weight."""

from halfstep.calibrators.calibrator import Calibrator, Max, WeightCalibrator, range_of
from halfstep.calibrators.diagnostics import Concern, data_concerns, disagreements, lost, unlike, unsteady
from halfstep.calibrators.entropy import Entropy
from halfstep.calibrators.error import levels
from halfstep.calibrators.mse import MSE, fitted_codebook
from halfstep.calibrators.percentile import MovingAverage, Percentile

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
