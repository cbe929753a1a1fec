"""Extremes per channel, for sites whose granularity has a scale per channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halfstep.errors import ArgumentError, DataError, NotObservedError
from halfstep.statistics.counting import HANDING_OVER


class ChannelRange:
    """The smallest and largest finite value of every channel of a stream of tensors.

    Merges exactly, as extremes do. A channel that saw nothing finite has no range yet. Costs 8 bytes per channel; a
    histogram per channel would cost a thousand times that, so only ``Max`` is on offer here.

    Args:
        axis: the channels' axis.

    Example:
        >>> channels = ChannelRange(axis=1)
        >>> channels.update(torch.tensor([[1.0, -2.0], [3.0, 5.0]]))
        >>> channels.range()
        (tensor([ 1., -2.]), tensor([3., 5.]))
    """

    def __init__(self, axis: int = 1) -> None:
        self.axis = axis
        self._low: Tensor | None = None  # (channels,) float32, +inf where nothing was seen
        self._high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in a tensor; NaN and infinities are left out, an empty one changes nothing. Threads may do so at once.

        Raises:
            ArgumentError: it has no such axis, or another number of channels than those before.
        """
        if not -x.dim() <= self.axis < x.dim():
            raise ArgumentError(f"axis: got {self.axis} for a tensor of shape {tuple(x.shape)}")
        if x.numel() == 0:
            return
        rows = x.detach().movedim(self.axis, 0).reshape(x.shape[self.axis], -1).float()  # (channels, rest)
        finite = torch.isfinite(rows)
        self._include(
            torch.where(finite, rows, torch.inf).amin(dim=1),
            torch.where(finite, rows, -torch.inf).amax(dim=1),
        )

    def merge(self, other: ChannelRange) -> None:
        """Take in what another one saw.

        Raises:
            ArgumentError: its axis or its number of channels differ.
        """
        if other.axis != self.axis:
            raise ArgumentError(f"merge: got channels along axis {other.axis}, needed axis {self.axis}")
        if other._low is not None and other._high is not None:
            self._include(other._low, other._high)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return (low, high), both float32 of (channels,), on the device of the tensors seen.

        Raises:
            NotObservedError: nothing was observed, or nothing finite in some channel.
        """
        if self._low is None or self._high is None:
            raise NotObservedError("no value was observed; run at least one batch through the model first")
        unseen = torch.nonzero(self._low > self._high).flatten().tolist()
        if unseen:
            raise NotObservedError(f"channels {unseen}: no finite value was observed")
        return self._low.clone(), self._high.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``low`` and ``high`` as CPU tensors; empty where nothing was seen."""
        if self._low is None or self._high is None:
            return {"low": torch.empty(0), "high": torch.empty(0)}
        return {"low": self._low.cpu().clone(), "high": self._high.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state by one that :meth:`state_dict` returned.

        Raises:
            DataError: a part is missing, unknown, or of another shape than the other.
        """
        if set(state) != {"low", "high"} or state["low"].shape != state["high"].shape:
            raise DataError(f"channel range state: got {sorted(state)}, needed high and low of one shape")
        seen = state["low"].numel() > 0
        self._low, self._high = (state[end].float().clone() if seen else None for end in ("low", "high"))

    def _include(self, low: Tensor, high: Tensor) -> None:
        with HANDING_OVER:
            self._take_in(low, high)

    def _take_in(self, low: Tensor, high: Tensor) -> None:
        if self._low is None or self._high is None:
            self._low, self._high = low.clone(), high.clone()
            return
        if low.shape != self._low.shape:
            raise ArgumentError(
                f"channels: got {low.numel()}, needed {self._low.numel()} as in the batches before"
            )
        self._low = torch.minimum(self._low, low.to(self._low.device))
        self._high = torch.maximum(self._high, high.to(self._high.device))
