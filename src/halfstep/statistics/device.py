"""The same count in plain torch operations, for tensors on an accelerator: only the number of NaN is waited for.

Also for the host where numba is told not to compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.statistics.keys import BINS, FIRST_SPECIAL, NAN, Int64
from halfstep.statistics.tails import ENDS, LOWEST, TAIL, Tails

_PIECE = (
    1 << 22
)  # elements per step: bounds the temporary memory to some 150 MB, and keeps the packed words in range
_SPREAD = 512  # places that zeros take in turn; additions to one address are done one after the other
_MAGNITUDE = 0x7FFFFFFF


class Tally:
    """Counts that live on a device until somebody reads them.

    Additions of integers are exact in any order, so the atomic additions of a GPU give the same state as the
    CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums = torch.zeros(2, BINS, dtype=torch.int64, device=device)  # counts, offsets
        self._specials = torch.zeros(5, dtype=torch.int64, device=device)
        self._ends = torch.full((ENDS, TAIL), LOWEST, dtype=torch.int32, device=device)

    def add(self, flat: Tensor) -> int:
        """Count a 1-D tensor of float32, float16 or bfloat16, and return how many are NaN."""
        for piece in torch.split(flat, _PIECE):
            self._add_bits(piece.float().view(torch.int32))
        return int(flat.isnan().sum())

    def _add_bits(self, bits: Tensor) -> None:
        magnitude = bits & _MAGNITUDE
        bits = torch.where(magnitude == 0, 0, bits)  # -0.0 counts as zero
        special, first_special = magnitude >= (FIRST_SPECIAL << 16), FIRST_SPECIAL << 16
        tiny = (magnitude > 0) & (magnitude < 0x10000)
        negative = bits < 0
        self._specials += torch.stack(
            [
                (magnitude > first_special).sum(),
                (bits == first_special).sum(),
                ((magnitude == first_special) & negative).sum(),
                (tiny & ~negative).sum(),
                (tiny & negative).sum(),
            ]
        )
        # Places 0 .. BINS - 1 are the bins; then those of zeros, and one for what is not counted.
        places = ((bits >> 16) & 0xFFFF).to(torch.int64)
        turn = torch.arange(bits.numel(), device=self.device) % _SPREAD + BINS
        places = torch.where(magnitude == 0, turn, places)
        places = torch.where(special, BINS + _SPREAD, places)
        words = torch.zeros(BINS + _SPREAD + 1, dtype=torch.int64, device=self.device)
        words.scatter_add_(0, places, (bits & 0xFFFF).to(torch.int64) + (1 << 40))
        self._sums[0] += words[:BINS] >> 40
        self._sums[1] += words[:BINS] & ((1 << 40) - 1)
        self._sums[0, 0] += words[BINS:-1].sum() >> 40

        ordered = bits ^ ((bits >> 31) & _MAGNITUDE)
        offered = torch.where(special, LOWEST, torch.stack([ordered, ~ordered]))
        largest = offered.topk(min(TAIL, bits.numel())).values
        self._ends = torch.cat([self._ends, largest], dim=1).topk(TAIL).values

    @property
    def nan_count(self) -> int:
        """NaN counted here; waits for the device."""
        return int(self._specials[NAN])

    def empty_into(self, counts: Int64, offsets: Int64, specials: Int64, tails: Tails) -> None:
        """Wait for the device, and add what it counted to a histogram's arrays."""
        sums = self._sums.cpu().numpy()
        counts += sums[0]
        offsets += sums[1]
        specials += self._specials.cpu().numpy()
        tails.merge(Tails(self._ends.cpu().numpy()))
