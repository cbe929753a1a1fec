"""FakeQuantize: the module that sits on a site."""

from __future__ import annotations

from enum import Enum

import torch
from torch import nn

from halfstep import functional
from halfstep.calibrators.calibrator import Calibrator, WeightCalibrator
from halfstep.errors import DataError, NotObservedError, named
from halfstep.formats import Format
from halfstep.granularity import Granularity
from halfstep.statistics import Histogram


class Mode(Enum):
    """What a FakeQuantize does with the tensor that passes."""

    FLOAT = "float"
    OBSERVE = "observe"
    QUANTIZE = "quantize"


class FakeQuantize(nn.Module):
    """Quantizes and dequantizes the tensor of one site, or observes it, or lets it through.

    Args:
        name: the site's name, for error messages.
        format: number format.
        granularity: how many scales.
        shape: of the tensor; the activation's batch dimension may be anything.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, name: str, format: Format, granularity: Granularity, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.format, self.granularity = name, format, granularity
        self.mode = Mode.FLOAT
        self.calibrated = False
        self.histogram = Histogram()
        parameters = granularity.parameter_shape(shape)
        self.register_buffer("scale", torch.ones(parameters))
        self.register_buffer("zero_point", torch.zeros(parameters, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape, dtype and device of ``x`` are kept."""
        if self.mode is Mode.QUANTIZE:
            if not self.calibrated:
                raise NotObservedError(f"site {self.name!r}: has no range yet; run observe() and calibrate()")
            return functional.fake_quantize(x, self.scale, self.zero_point, self.format, self.granularity)
        if self.mode is Mode.OBSERVE:
            self._observe(x)
        return x

    def _observe(self, x: torch.Tensor) -> None:
        before = self.histogram.nan_count
        self.histogram.update(x.detach())
        if nans := self.histogram.nan_count - before:
            raise DataError(
                f"site {self.name!r}: {nans} of {x.numel()} values are NaN; look for NaN in the calibration data, or "
                "for a layer that overflows on it"
            )

    def calibrate(self, calibrator: Calibrator) -> None:
        """Set scale and zero point from what was observed.

        Raises:
            NotObservedError: naming the site, if nothing was.
        """
        with named(f"site {self.name!r}"):
            low, high = calibrator.range(self.histogram, self.format)
            self.set_range(torch.tensor(low), torch.tensor(high))

    def calibrate_weight(self, weight: torch.Tensor, calibrator: WeightCalibrator) -> None:
        """Set scale and zero point from the weight itself."""
        with named(f"weight {self.name!r}"):
            self.set_range(*calibrator.weight_range(weight.detach(), self.format, self.granularity))

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Set scale and zero point so that [low, high] is representable (shapes as the scale's)."""
        scale, zero_point = self.format.parameters(low, high)
        self.scale.copy_(scale.expand(self.scale.shape))
        self.zero_point.copy_(zero_point.expand(self.zero_point.shape))
        self.calibrated = True

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The effective range: the smallest and the largest value that is represented without clipping.

        Raises:
            NotObservedError: before calibration.
        """
        if not self.calibrated:
            raise NotObservedError(f"site {self.name!r}: has no range yet; run observe() and calibrate()")
        return self.format.range(self.scale, self.zero_point)

    def extra_repr(self) -> str:
        """Format, granularity and mode."""
        return f"{self.format}, {self.granularity}, {self.mode.value}"
