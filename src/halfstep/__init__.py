"""halfstep: quantize a trained network to an accuracy target, proven on the runtime it is deployed to."""

from halfstep.interrupted import end_in_one_line

end_in_one_line()  # before torch loads
# isort: split

from halfstep.calibration.calibrate import calibrate, observe
from halfstep.calibration.candidates import Candidate, Sweep, best_of
from halfstep.calibration.diagnostics import SiteConcern, concerns
from halfstep.calibration.shards import gather_statistics, load_statistics, save_statistics
from halfstep.calibrators import MSE, Entropy, Max, MovingAverage, Percentile
from halfstep.errors import HalfstepError
from halfstep.evaluate import SQNR, Accuracy, Agreement, CallableMetric, Cosine, Metric, Score, SetMetric
from halfstep.export.onnx import export_float, export_onnx
from halfstep.export.verify import Verification, verify
from halfstep.formats import E2M1, E4M3, E5M2, Codebook, Floating, Integer
from halfstep.granularity import PerChannel, PerGroup, PerTensor
from halfstep.ladder.alone import MixedBitsResult, PartialResult, mixed_bits, partial
from halfstep.ladder.costs import Tuning, tune
from halfstep.ladder.mixed_bits import MixedBits
from halfstep.ladder.outcome import Outcome
from halfstep.ladder.partial import Partial
from halfstep.ladder.prepare import prepare
from halfstep.ladder.ptq import PTQ
from halfstep.ladder.qat import QAT, train
from halfstep.ladder.quantize import quantize
from halfstep.ladder.repairs import Repairs, repair
from halfstep.ladder.rung import Cost, Rung
from halfstep.ladder.sensitivity import Sensitivity, sensitivity
from halfstep.model import QuantizedModel
from halfstep.onnx_in.from_file import from_onnx
from halfstep.progress import Budget
from halfstep.recipe import LayerSpec, Recipe, TensorSpec
from halfstep.repair.bias import correct_bias
from halfstep.repair.equalize import equalize
from halfstep.repair.learner import Reconstruction
from halfstep.repair.ranges import weigh_ranges
from halfstep.repair.reconstruct import reconstruct
from halfstep.repair.record import Repair
from halfstep.repair.rounding import gptq, learn_rounding
from halfstep.repair.smooth_quant import migrate
from halfstep.report.site_plot import plot_site
from halfstep.training.distillation import Distillation
from halfstep.training.options import Training
from halfstep.training.oscillation import Damping, Freezing
from halfstep.training.ranges import Ranges
from halfstep.training.sharding import shard, whole_state_dict
from halfstep.training.trained import Trained

__all__ = [
    "E2M1",
    "E4M3",
    "E5M2",
    "MSE",
    "PTQ",
    "QAT",
    "SQNR",
    "Accuracy",
    "Agreement",
    "Budget",
    "CallableMetric",
    "Candidate",
    "Codebook",
    "Cosine",
    "Cost",
    "Damping",
    "Distillation",
    "Entropy",
    "Floating",
    "Freezing",
    "HalfstepError",
    "Integer",
    "LayerSpec",
    "Max",
    "Metric",
    "MixedBits",
    "MixedBitsResult",
    "MovingAverage",
    "Outcome",
    "Partial",
    "PartialResult",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Percentile",
    "QuantizedModel",
    "Ranges",
    "Recipe",
    "Reconstruction",
    "Repair",
    "Repairs",
    "Rung",
    "Score",
    "Sensitivity",
    "SetMetric",
    "SiteConcern",
    "Sweep",
    "TensorSpec",
    "Trained",
    "Training",
    "Tuning",
    "Verification",
    "best_of",
    "calibrate",
    "concerns",
    "correct_bias",
    "equalize",
    "export_float",
    "export_onnx",
    "from_onnx",
    "gather_statistics",
    "gptq",
    "learn_rounding",
    "load_statistics",
    "migrate",
    "mixed_bits",
    "observe",
    "partial",
    "plot_site",
    "prepare",
    "quantize",
    "reconstruct",
    "repair",
    "save_statistics",
    "sensitivity",
    "shard",
    "train",
    "tune",
    "verify",
    "weigh_ranges",
    "whole_state_dict",
]
