"""RunTimeQuantize: the module at a site whose range is computed from each tensor that passes."""

from __future__ import annotations

import torch

from halfstep import functional
from halfstep.calibrators.calibrator import Calibrator
from halfstep.errors import ArgumentError, named
from halfstep.fake_quantize import FakeQuantize
from halfstep.formats import Integer
from halfstep.functional import STE, run_time_parameters
from halfstep.granularity import Granularity, PerTensor


class RunTimeQuantize(FakeQuantize):
    """Quantizes and dequantizes with the range of the tensor at hand; there is nothing to observe or calibrate.

    Gradients pass straight through; the range is taken as a constant.

    Args:
        name: the site's name, for error messages.
        format: an integer format.
        granularity: which elements share a range.
    """

    dynamic = True

    def __init__(self, name: str, format: Integer, granularity: Granularity) -> None:
        super().__init__(name, format, PerTensor(), ())
        self.granularity = granularity
        self.scale.fill_(1.0)
        self.calibrated = True

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """What ``x`` becomes when it is quantized and dequantized, whatever the mode."""
        if not x.numel():
            return x
        assert isinstance(self.format, Integer)
        with named(f"site {self.name!r}"):
            scale, zero_point = run_time_parameters(x, self.format, self.granularity)
            return functional.fake_quantize(x, scale, zero_point, self.format, self.granularity, STE)

    def _observe(self, x: torch.Tensor) -> None:
        """Nothing: no range depends on what was seen."""

    def calibrate(self, calibrator: Calibrator) -> None:
        """Nothing: whatever the calibrator, the range comes from the tensor."""

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """There is none to tell.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(f"site {self.name!r}: its range is computed at run time, from each tensor anew")
