"""What learns in a block while it is reconstructed: roundings, shifts of biases; and what is dropped meanwhile.

Each stands in a wiring in the place of the quantizer or shift that it learns for, see :mod:`halfstep.fidelity.replay`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halfstep import functional
from halfstep.bias_shift import BiasShift
from halfstep.fake_quantize import FakeQuantize
from halfstep.formats import Integer

#: A sigmoid stretched to these ends and clipped to [0, 1] reaches both.
LOW, HIGH = -0.1, 1.1

#: How far a weight is at least on the way to its neighbour when it begins: at the clipped ends there would be no
#: gradient; and at most, so that without any gradient it stays where it was.
LEAST, MOST = 0.02, 0.25


class SoftRounding(nn.Module):
    """Lets each weight be anywhere between two neighbouring numbers of its format, and decides for one in the end.

    The two are the number that the weight rounds to now (to nearest, or as another repair has it) and the next one on
    the float weight's side of it; beyond the range, the next one inside. With v learned and h(v) a sigmoid stretched
    and clipped to [0, 1], the weight is ``number + h(v) * gap``, all times the growth of the learned scale. It begins
    on the way to the float weight, at most a quarter of the gap from the number. The longer it learns, the more weights
    are set to the nearer one of their numbers, the surest first: those that are left make up for it. So no term of the
    loss is needed that drives them apart, whose weight would have to be tuned.

    Args:
        site: quantizes the weight; calibrated, perhaps with a rounding that was learned.
        weight: the float one.
        learn_scale: learn the site's scale too; formats that have none to learn leave it.

    Source: the rectified sigmoid is that of Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
    Quantization", 2020, equation 23; scales learned with the roundings, of Jeon, Lee, Kim, "Genie: Show Me the Data for
    Quantization", 2023, section 3.3; setting the surest first, of Li, Panda, "TesseraQ: Ultra Low-Bit LLM Post-Training
    Quantization with Block Reconstruction", 2024, section 3.2.
    """

    number: Tensor
    gap: Tensor
    settled: Tensor
    up: Tensor

    def __init__(self, site: FakeQuantize, weight: Tensor, learn_scale: bool) -> None:
        super().__init__()
        # Not a submodule: what the site learns is the model's, and is told apart by the optimizer.
        self._site = (site,)
        parameters = site.scale.detach(), site.zero_point, site.format, site.granularity
        self._codes = site.codes(weight).long()
        number = functional.dequantize(self._codes, *parameters, weight.dtype)
        lowest, highest = ends(site)
        towards = torch.where(weight >= number, 1, -1)
        outside = (self._codes + towards > highest) | (self._codes + towards < lowest)
        self._neighbours = self._codes + torch.where(outside, -towards, towards)
        gap = functional.dequantize(self._neighbours, *parameters, weight.dtype) - number
        share = ((weight - number) / gap).clamp(LEAST, MOST)
        self.v = nn.Parameter(torch.logit((share - LOW) / (HIGH - LOW)))
        self.register_buffer("number", number)
        self.register_buffer("gap", gap)
        self.register_buffer("settled", torch.zeros_like(weight, dtype=torch.bool))
        self.register_buffer("up", torch.zeros_like(weight))
        if learn_scale:
            site.learn()

    @property
    def site(self) -> FakeQuantize:
        """The one that it stands for."""
        return self._site[0]

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it is now; the float one is known."""
        share = torch.where(self.settled, self.up, self._share().clamp(0, 1))
        x = torch.addcmul(self.number, share, self.gap)
        growth = self.site.growth
        return x if growth is None else x * self.site.granularity.expand(torch.exp2(growth), x.shape)

    @torch.no_grad()
    def settle(self, part: float) -> None:
        """Set so many of the weights for good, 0 to 1 of them, those before included."""
        share = self._share()
        more = round(part * share.numel()) - int(self.settled.sum())
        if more > 0:
            sure = (share - 0.5).abs().masked_fill(self.settled, -1.0)
            chosen = sure.flatten().topk(more).indices
            self.settled.view(-1)[chosen] = True
            self.up.view(-1)[chosen] = (share.flatten()[chosen] >= 0.5).to(self.up.dtype)

    @torch.no_grad()
    def hold(self) -> None:
        """Set every weight for the number that it has; the scale alone is learned then."""
        self.settled.fill_(True)
        self.v.requires_grad_(False)

    def codes(self) -> Tensor:
        """The codes that were decided for, once all are settled."""
        return torch.where(self.up > 0, self._neighbours, self._codes)

    def _share(self) -> Tensor:
        """How far each weight is on the way to its neighbour, not clipped."""
        return torch.sigmoid(self.v) * (HIGH - LOW) + LOW


def ends(site: FakeQuantize) -> tuple[int, int]:
    """The first and the last code of an integer or codebook format."""
    format = site.format
    return (format.quant_min, format.quant_max) if isinstance(format, Integer) else (0, format.levels - 1)


class LearnedShift(nn.Module):
    """A bias's shift as a parameter.

    Args:
        shift: the one it stands for, active.
        unit: what the parameter counts in: the deviation of the layer's outputs.
    """

    def __init__(self, shift: BiasShift, unit: Tensor) -> None:
        super().__init__()
        self._shift, self.unit = (shift,), unit
        self.delta = nn.Parameter(torch.zeros_like(shift.shift))

    def forward(self, bias: Tensor) -> Tensor:
        """The bias as the quantized layer adds it."""
        corrected: Tensor = self._shift[0](bias + self.delta * self.unit)
        return corrected

    def keep(self) -> None:
        """Add what was learned to the shift."""
        shift = self._shift[0].shift
        shift.add_((self.delta.detach() * self.unit).to(shift))


class Drops:
    """Random masks that drop quantization, each a piece of one long pool: drawing takes longer than a layer does.

    Args:
        share: the probability that an element stays float.
        seed: of the pool and of where pieces begin.
        device: of the masks.
    """

    def __init__(self, share: float, seed: int, device: torch.device) -> None:
        self.share, self._generator = share, torch.Generator().manual_seed(seed)
        self._pool = self._more(2**20, device)

    def mix(self, kept: Tensor, quantized: Tensor) -> Tensor:
        """Each element of either, ``kept`` with the probability."""
        return torch.lerp(kept, quantized, self.mask(kept))

    def mask(self, like: Tensor) -> Tensor:
        """Zeros with the probability, else ones, of the shape, dtype and order of memory of ``like``."""
        size = like.numel()
        if 2 * size > len(self._pool):
            self._pool = self._more(2 * size, self._pool.device)
        start = int(torch.randint(len(self._pool) - size, (), generator=self._generator))
        strides = torch.empty_like(like, device="meta").stride()
        return self._pool.as_strided(like.shape, strides, start).to(like.dtype)

    def _more(self, size: int, device: torch.device) -> Tensor:
        return (torch.rand(size, generator=self._generator) >= self.share).float().to(device)


class Dropping(nn.Module):
    """An activation's quantizer that lets random elements through in float.

    Args:
        quantizer: the one it stands for.
        drops: which.

    Source: Wei, Gong, Li, Liu, Yu, "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training
    Quantization", 2022, section 3.3.
    """

    def __init__(self, quantizer: FakeQuantize, drops: Drops) -> None:
        super().__init__()
        self._quantizer, self._drops = (quantizer,), drops

    def forward(self, x: Tensor) -> Tensor:
        """Shape, dtype and device of ``x`` are kept."""
        return self._quantizer[0].some_rounded(x, self._drops.mask(x))
