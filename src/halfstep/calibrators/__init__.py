"""Calibrators: which range a format shall cover, asked of a histogram or of a weight."""

from halfstep.calibrators.calibrator import Calibrator, WeightCalibrator
from halfstep.calibrators.maximum import Max

__all__ = ["Calibrator", "Max", "WeightCalibrator"]
