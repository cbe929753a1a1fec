"""The modules that sit on a site: FakeQuantize with ranges set before, RunTimeQuantize with a tensor's own.

RunTimeQuantize: the module at a site whose range is computed from each tensor that passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from halfstep import functional
from halfstep.calibrators.calibrator import Calibrator, Max, WeightCalibrator, range_of
from halfstep.errors import ArgumentError, DataError, FormatError, NotObservedError, named
from halfstep.formats import Codebook, Format, Integer
from halfstep.formats.codebook import increasing, midpoints
from halfstep.functional import CLIPPED_STE, LSQ, STE, Gradient, run_time_parameters
from halfstep.granularity import Granularity, PerChannel, PerTensor
from halfstep.statistics import ChannelRange, Histogram


class Mode(Enum):
    """What a FakeQuantize does with the tensor that passes."""

    FLOAT = "float"
    OBSERVE = "observe"
    QUANTIZE = "quantize"


#: What training may move, by the names that parameters and state dicts use.
LEARNABLE = ("growth", "zero", "values")


#: For what is observed in this thread: which values of a site's tensor count, as a mask; None for all of them.
OBSERVED: ContextVar[Callable[[str, torch.Tensor], torch.Tensor | None] | None] = ContextVar(
    "observed", default=None
)


#: What to do about NaN.
NAN_CURE = "look for NaN in the calibration data, or for a layer that overflows on it"


class FakeQuantize(nn.Module):
    """Quantizes and dequantizes the tensor of one site, or observes it, or lets it through.

    Scale and zero point are buffers. After :meth:`learn` they follow from parameters that an optimizer moves, until
    :meth:`settle` makes buffers of them again; ``scale``, ``zero_point`` and ``format`` tell what holds now.

    Args:
        name: the site's name, for error messages.
        format: number format.
        granularity: how many scales.
        shape: of the tensor; the activation's batch dimension may be anything.
    """

    #: Whether the range is computed from each tensor at run time; see :class:`.RunTimeQuantize`.
    dynamic = False

    growth: nn.Parameter | None
    zero: nn.Parameter | None
    values: nn.Parameter | None
    offset: torch.Tensor | None

    def __init__(self, name: str, format: Format, granularity: Granularity, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.granularity = name, granularity
        self._format = format
        self.mode = Mode.FLOAT
        self.calibrated = False
        self.calibrated_by: Calibrator | WeightCalibrator | None = None  # so that it can be done again
        self.gradient: Gradient = CLIPPED_STE
        self.histogram = Histogram()
        #: Beside it, where there is a scale per channel; weights do not use it.
        self.channels = ChannelRange(granularity.axis) if isinstance(granularity, PerChannel) else None
        parameters = granularity.parameter_shape(shape)
        # Not by register_buffer, which refuses the names of properties. A scale of NaN says: not calibrated.
        self._buffers["scale"] = torch.full(parameters, float("nan"))
        self._buffers["zero_point"] = torch.zeros(parameters, dtype=torch.int32)
        for parameter in LEARNABLE:
            self.register_parameter(parameter, None)
        # What a learned rounding adds to the weight before it is quantized. The float weight stays what it was, for
        # layers put back to float, and training goes on from there.
        self.register_buffer("offset", None)
        #: A tensor and what it becomes, for as long as neither it nor the range changes; see :meth:`hold`.
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def scale(self) -> torch.Tensor:
        """The scale that holds now, float32; differentiable where it is learned."""
        scale = self._buffers["scale"]
        assert scale is not None
        return scale if self.growth is None else scale * torch.exp2(self.growth)

    @property
    def zero_point(self) -> torch.Tensor:
        """The zero point that holds now, int32; a learned one rounded."""
        if self.zero is not None and isinstance(self._format, Integer):
            low, high = self._format.quant_min, self._format.quant_max
            return self.zero.detach().round().clamp(low, high).int()
        zero_point = self._buffers["zero_point"]
        assert zero_point is not None
        return zero_point

    @property
    def format(self) -> Format:
        """The number format, with the values that a learned codebook has now."""
        if self.values is None or not isinstance(self._format, Codebook):
            return self._format
        if not bool(self.values.isfinite().all()):
            raise FormatError("codebook: a learned value is NaN or infinite")
        values = increasing(self.values)
        return replace(self._format, values=values, thresholds=midpoints(values), ties_up=False)

    @format.setter
    def format(self, format: Format) -> None:
        self._format, self.values = format, None

    def forward(self, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """Shape, dtype and device of ``x`` are kept.

        With ``overwrite`` nobody reads ``x`` afterwards, and without gradients the result may be written into it,
        unless a hook looks at it.
        """
        if self.mode is Mode.QUANTIZE:
            if not self.calibrated:
                raise NotObservedError(f"site {self.name!r}: has no range yet; run observe() and calibrate()")
            held = self.held
            if held is not None and held[0] is x:
                return held[1]
            watched = self._forward_hooks or self._forward_pre_hooks
            return self.rounded(x, overwrite and not watched)
        if self.mode is Mode.OBSERVE:
            self._observe(x)
        return x

    def hold(self, x: torch.Tensor) -> None:
        """Keep what ``x`` becomes, so that it need not be computed for each part of a batch; ``held = None`` ends it.

        Whoever asks for it sees to it that meanwhile neither ``x`` nor the range changes.
        """
        self.held = None
        self.held = x, self(x)

    def _observe(self, x: torch.Tensor) -> None:
        select = OBSERVED.get()
        kept = None if select is None else select(self.name, x)
        if nans := self.histogram.update(x if kept is None else x.masked_select(kept)):
            raise DataError(f"site {self.name!r}: {nans} of {x.numel()} values are NaN; {NAN_CURE}")
        if self.channels is not None:
            self.channels.update(x if kept is None else x.masked_fill(~kept, torch.inf))

    @staticmethod
    def check_observed(sites: Iterable[FakeQuantize]) -> None:
        """Raise where an accelerator has counted NaN; it is waited for once, for all sites.

        On the CPU each site raises by itself, as it sees them.

        Raises:
            DataError: naming the first site.
        """
        waiting = [(site.name, seen.nans_there) for site in sites for seen in site.histogram.parts]
        there = [(name, count) for name, count in waiting if count is not None]
        counts = torch.stack([count for _, count in there]).tolist() if there else []
        for (name, _), count in zip(there, counts, strict=True):
            if count:
                raise DataError(f"site {name!r}: {count} values are NaN; {NAN_CURE}")

    def statistics(self) -> dict[str, torch.Tensor]:
        """What was seen, as tensors that :meth:`add_statistics` of another process takes."""
        state = self.histogram.state_dict()
        return state if self.channels is None else {**state, **self.channels.state_dict()}

    def add_statistics(self, state: Mapping[str, torch.Tensor]) -> None:
        """Add what another one saw of the same site.

        Raises:
            DataError: a part is missing, unknown, or of the wrong shape.
        """
        ends = {"low", "high"} if self.channels is not None else set()
        seen = Histogram()
        seen.load_state_dict({part: tensor for part, tensor in state.items() if part not in ends})
        if self.channels is not None:
            channels = ChannelRange(self.channels.axis)
            channels.load_state_dict({part: state[part] for part in ends & set(state)})
            self.channels.merge(channels)
        if self.histogram.count or self.histogram.keeps_batch_ranges == seen.keeps_batch_ranges:
            self.histogram.merge(seen)
        else:
            self.histogram = seen

    def forget(self, batch_ranges: bool | None = None) -> None:
        """Start the statistics anew.

        Args:
            batch_ranges: also keep the range of every batch, for :class:`.MovingAverage`; None does as before.
        """
        keeps = self.histogram.keeps_batch_ranges if batch_ranges is None else batch_ranges
        self.histogram = Histogram(batch_ranges=keeps)
        if self.channels is not None:
            self.channels = ChannelRange(self.channels.axis)

    # the range

    def calibrate(self, calibrator: Calibrator) -> None:
        """Set scale and zero point from what was observed.

        Raises:
            NotObservedError: naming the site, if nothing was.
        """
        self.set_range(*self.observed_range(calibrator))
        self.calibrated_by = calibrator

    def widen(self, usual: FakeQuantize) -> None:
        """Take the place of the quantizer of the same tensor in fewer bits.

        Its statistics are shared. The range is that of all that was seen, for 16 bits have room for outliers; or the
        other one's range where the statistics are gone.
        """
        self.histogram, self.channels = usual.histogram, usual.channels
        if self.histogram.count:
            self.calibrate(Max())
        elif usual.calibrated:
            self.set_range(*(end.to(self.scale.device) for end in usual.range()))

    def calibrate_weight(self, weight: torch.Tensor, calibrator: WeightCalibrator) -> None:
        """Set scale and zero point from the weight itself."""
        self.set_range(*self.weight_range(weight, calibrator))
        self.calibrated_by = calibrator

    def observed_range(self, calibrator: Calibrator) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``calibrator`` answers from what was observed: low and high of the scale's shape.

        Where there is a scale per channel, each channel's own extremes, cut off at the range that the calibrator
        answers for the whole tensor: a histogram for every channel would take a thousand times the memory.

        Raises:
            NotObservedError: naming the site, if nothing was.
        """
        with named(f"site {self.name!r}"):
            ends = range_of(calibrator, self.histogram, self.format)
            low, high = torch.tensor(ends[0]), torch.tensor(ends[1])
            if self.channels is None:
                return low, high
            lows, highs = (end.cpu() for end in self.channels.range())
            if self.format.symmetric:
                highs = torch.maximum(-lows, highs)
                lows = -highs
            return lows.clamp(max=0.0).maximum(low), highs.clamp(min=0.0).minimum(high)

    def weight_range(
        self, weight: torch.Tensor, calibrator: WeightCalibrator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``calibrator`` answers for the weight itself: low and high of the scale's shape."""
        with named(f"weight {self.name!r}"):
            return calibrator.weight_range(weight.detach(), self.format, self.granularity)

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Set scale and zero point so that [low, high] is representable (shapes as the scale's).

        What was learned for the old range (its growth, zero point, rounding) is forgotten; the values of a learned
        codebook stay.
        """
        scale, zero_point = self.format.parameters(low, high)
        self.growth = self.zero = self.offset = None
        self.scale.copy_(scale.expand(self.scale.shape))
        self.zero_point.copy_(zero_point.expand(self.zero_point.shape))
        self.calibrated = True

    def round_to(self, weight: torch.Tensor, values: torch.Tensor) -> None:
        """Let ``weight`` round to ``values`` from now on: numbers of the format at the present range."""
        self.offset = (values - weight).detach()

    def rounded(self, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """What ``x`` becomes when it is quantized and dequantized, whatever the mode; see :meth:`forward`."""
        x = self.shifted(x)
        if self.values is not None:
            scale = self.scale if self._scaled else None
            return functional.fake_quantize_learned(x, self.values, scale, self.granularity, self.gradient)
        zero_point = self.zero_point if self.zero is None else self.zero
        return functional.fake_quantize(
            x, self.scale, zero_point, self._format, self.granularity, self.gradient, overwrite
        )

    def some_rounded(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """:meth:`rounded` where the mask is 1, and ``x`` where it is 0."""
        if self.dynamic or self.values is not None or self.offset is not None:
            return torch.lerp(x, self.rounded(x), mask)
        zero_point = self.zero_point if self.zero is None else self.zero
        return functional.quantize_some(
            x, mask, self.scale, zero_point, self._format, self.granularity, self.gradient
        )

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The codes of :meth:`rounded`, in the format's dtype."""
        return functional.quantize(
            self.shifted(x), self.scale, self.zero_point, self.format, self.granularity
        )

    def round_to_codes(self, weight: torch.Tensor, codes: torch.Tensor) -> None:
        """:meth:`round_to` the numbers of these codes."""
        codes = codes.to(weight.device)
        parameters = self.scale, self.zero_point, self.format, self.granularity
        self.round_to(weight, functional.dequantize(codes, *parameters, weight.dtype))

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
        return self.format.range(self.scale.detach(), self.zero_point)

    # learning it

    @property
    def _scaled(self) -> bool:
        return not (isinstance(self._format, Codebook) and not self._format.scaled)

    def learn(self, step: bool = True, offset: bool = False, values: bool = False) -> list[nn.Parameter]:
        """Make parameters of the range, starting from where it is; :meth:`settle` ends it.

        What a format lacks is left out: the step of absolute codebooks, and of scales that must be powers of two;
        the offset of symmetric formats, and of ranges that start at 0, where ReLU needs the zero point to stay the
        lowest code; the values of uniform formats.

        Args:
            step: learn the scale's growth, log2 of what it is now over what it was, which keeps it positive and makes
                its updates relative ones; with LSQ's gradient, unless :attr:`gradient` was set to another before.
            offset: learn the zero point, in codes; it is rounded in use.
            values: learn a codebook's values; thresholds become the midpoints.

        Returns:
            The new parameters.

        Raises:
            NotObservedError: before calibration.

        Source: Esser et al. 2020, "Learned Step Size Quantization"; Bhalgat et al. 2020, "LSQ+" (offset).
        """
        low, _ = self.range()
        format = self._format
        if step and self._scaled and not (isinstance(format, Integer) and format.power_of_two):
            self.growth = nn.Parameter(torch.zeros_like(self.scale))
            if self.gradient is CLIPPED_STE:
                self.gradient = LSQ
        affine = isinstance(format, Integer) and format.fixed_zero_point is None
        if offset and affine and bool((low < 0).any()):
            self.zero = nn.Parameter(self.zero_point.to(self.scale.dtype))
        if values and isinstance(format, Codebook):
            numbers = format.values if self.values is None else self.values.detach()
            self.values = nn.Parameter(numbers.to(self.scale.device, copy=True))
        return [parameter for parameter in self.parameters(recurse=False) if parameter.requires_grad]

    def settle(self) -> None:
        """Keep the learned range as buffers; what was learned of a codebook's values stays as it is."""
        scale, zero_point = self.scale.detach(), self.zero_point
        self.growth = self.zero = None
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        if self.values is not None:
            self.values.requires_grad_(False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load, with the parameters that the saved one had, calibrated if it was."""
        if f"{prefix}scale" in state_dict:
            for name in LEARNABLE:
                saved, own = state_dict.get(prefix + name), getattr(self, name)
                if saved is None:
                    setattr(self, name, None)
                elif own is None or own.shape != saved.shape:
                    setattr(self, name, nn.Parameter(torch.empty_like(saved, device=self.scale.device)))
            offset = state_dict.get(f"{prefix}offset")
            self.offset = None if offset is None else torch.empty_like(offset, device=self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.calibrated = bool(torch.isfinite(self.scale).all())

    def extra_repr(self) -> str:
        """Format, granularity and mode."""
        return f"{self._format}, {self.granularity}, {self.mode.value}"


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

    def rounded(self, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """What ``x`` becomes when it is quantized and dequantized, whatever the mode; ``x`` is left as it is."""
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
