"""FakeQuantize: the module that sits on a site."""

from __future__ import annotations

from enum import Enum
from typing import Any

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

    #: Whether the range is computed from each tensor at run time; see :class:`.RunTimeQuantize`.
    dynamic = False

    scale: torch.Tensor
    zero_point: torch.Tensor
    offset: torch.Tensor | None

    def __init__(self, name: str, format: Format, granularity: Granularity, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.format, self.granularity = name, format, granularity
        self.mode = Mode.FLOAT
        self.calibrated = False
        self.calibrated_by: Calibrator | WeightCalibrator | None = None  # so that it can be done again
        self.histogram = Histogram()
        parameters = granularity.parameter_shape(shape)
        self.register_buffer("scale", torch.ones(parameters))
        self.register_buffer("zero_point", torch.zeros(parameters, dtype=torch.int32))
        # What a learned rounding adds to the weight before it is quantized. The float weight stays what it was, for
        # layers put back to float, and training goes on from there.
        self.register_buffer("offset", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape, dtype and device of ``x`` are kept."""
        if self.mode is Mode.QUANTIZE:
            if not self.calibrated:
                raise NotObservedError(f"site {self.name!r}: has no range yet; run observe() and calibrate()")
            return self.rounded(x)
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
        self.set_range(*self.observed_range(calibrator))
        self.calibrated_by = calibrator

    def calibrate_weight(self, weight: torch.Tensor, calibrator: WeightCalibrator) -> None:
        """Set scale and zero point from the weight itself."""
        self.set_range(*self.weight_range(weight, calibrator))
        self.calibrated_by = calibrator

    def observed_range(self, calibrator: Calibrator) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``calibrator`` answers from what was observed: low and high of the scale's shape.

        Raises:
            NotObservedError: naming the site, if nothing was.
        """
        with named(f"site {self.name!r}"):
            low, high = calibrator.range(self.histogram, self.format)
            return torch.tensor(low), torch.tensor(high)

    def weight_range(
        self, weight: torch.Tensor, calibrator: WeightCalibrator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``calibrator`` answers for the weight itself: low and high of the scale's shape."""
        with named(f"weight {self.name!r}"):
            return calibrator.weight_range(weight.detach(), self.format, self.granularity)

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Set scale and zero point so that [low, high] is representable (shapes as the scale's).

        A rounding learned for the old range is dropped.
        """
        scale, zero_point = self.format.parameters(low, high)
        self.offset = None
        self.scale.copy_(scale.expand(self.scale.shape))
        self.zero_point.copy_(zero_point.expand(self.zero_point.shape))
        self.calibrated = True

    def round_to(self, weight: torch.Tensor, values: torch.Tensor) -> None:
        """Let ``weight`` round to ``values`` from now on: numbers of the format at the present range."""
        self.offset = (values - weight).detach()

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """What ``x`` becomes when it is quantized and dequantized, whatever the mode."""
        x = self.shifted(x)
        return functional.fake_quantize(x, self.scale, self.zero_point, self.format, self.granularity)

    def shifted(self, x: torch.Tensor) -> torch.Tensor:
        """What is quantized when ``x`` passes: ``x`` itself, or moved to where a learned rounding wants it."""
        return x if self.offset is None else x + self.offset.to(x.device)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The effective range: the smallest and the largest value that is represented without clipping.

        Raises:
            NotObservedError: before calibration.
        """
        if not self.calibrated:
            raise NotObservedError(f"site {self.name!r}: has no range yet; run observe() and calibrate()")
        return self.format.range(self.scale, self.zero_point)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over a learned rounding where there is one, or lose it where there is none."""
        offset = state_dict.get(f"{prefix}offset")
        self.offset = None if offset is None else torch.empty_like(offset, device=self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Format, granularity and mode."""
        return f"{self.format}, {self.granularity}, {self.mode.value}"
