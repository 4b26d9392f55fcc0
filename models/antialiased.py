"""Snakebeta, applied at twice the rate between two low-pass filters, so that its harmonics do not fold back as noise.

BigVGAN (arXiv 2206.04658) puts this activation before every convolution. Its two filters are buffers in the public
checkpoints and are therefore buffers here, although each of them is the same twelve numbers.

On a CPU the two filters are half of a vocoder's time when they are depthwise convolutions: these use a fraction of its
arithmetic, and tensors of a whole stage leave its caches. There a few channels at a time pass through all three steps,
and a filter is a matrix product over short blocks; elsewhere the convolutions stay.

Legend: B clips, C channels, T samples of a stage.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

TAPS = 12
"""Length of the filter: 6 taps for each of the two phases of a doubled rate."""

CUTOFF = 0.25
"""Cycles a sample at the doubled rate: the band that the original rate can hold."""

TRANSITION = 0.3
"""Half the width of the transition band, as a part of the sampling rate."""

BLOCK = 16
"""Samples of the original rate that one row of the CPU's matrix products makes or reads. Longer rows multiply more
zeros, shorter ones copy more of the overlap."""

CACHED_SAMPLES = 2**17
"""Samples that pass through an activation at once on a CPU: half a megabyte of float32 and its double fit the cache."""


def kaiser_sinc_filter() -> Tensor:
    """The low-pass filter [12], symmetric and of sum 1: a sinc under a Kaiser window, float32.

    The window's beta follows from the attenuation in dB by Kaiser's formulas (Kaiser 1974), which BigVGAN applies to
    half the taps: 51 dB and 4.66.
    """
    attenuation_db = 2.285 * (TAPS // 2 - 1) * math.pi * 4 * TRANSITION + 7.95
    beta = 0.1102 * (attenuation_db - 8.7)
    # On the CPU and in float32 throughout: so the numbers are the original network's to the last bit.
    window = torch.kaiser_window(TAPS, periodic=False, beta=beta, dtype=torch.float32, device="cpu")
    offsets = torch.arange(TAPS, dtype=torch.float32, device="cpu") - (TAPS - 1) / 2
    taps = window * torch.sinc(2 * CUTOFF * offsets)
    return (taps / taps.sum()).to(torch.get_default_device())


class SnakeBeta(nn.Module):
    """x + sin²(x · e^alpha) / (e^beta + 1e-9), alpha and beta learned for each channel."""

    def __init__(self, num_channels: int) -> None:
        """Start with e^alpha = e^beta = 1."""
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(num_channels))
        self.beta = nn.Parameter(torch.zeros(num_channels))

    def scales(self) -> tuple[Tensor, Tensor]:
        """Frequency e^alpha and height 1 / (e^beta + 1e-9), [C, 1] each."""
        return self.alpha.exp()[:, None], 1 / (self.beta.exp() + 1e-9)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        return snake(x, *self.scales())


def snake(x: Tensor, frequency: Tensor, height: Tensor) -> Tensor:
    """x + height · sin²(frequency · x) for x [B, C, T] and one of each a channel, [C, 1]."""
    # In place, since these are the largest tensors of the network; autograd keeps copies of its own.
    return torch.addcmul(x, (x * frequency).sin_().square_(), height)


def _blockwise(padded: Tensor, matrix: Tensor, step: int) -> Tensor:
    """Windows [B, C, window] of `padded` every `step` samples times `matrix` [window, made], one after another."""
    windows = padded.unfold(-1, matrix.shape[0], step)
    return rearrange(windows @ matrix, "b c n made -> b c (n made)")


class LowPass(nn.Module):
    """The filter, on every second sample only: halves the rate."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", kaiser_sinc_filter()[None, None])

    def matrix(self) -> Tensor:
        """The filter on 2 BLOCK samples and 10 around them, of which it makes BLOCK: [2 BLOCK + 10, BLOCK]."""
        units = torch.eye(2 * BLOCK + TAPS - 2, dtype=self.filter.dtype, device=self.filter.device)[:, None]
        return F.conv1d(units, self.filter, stride=2)[:, 0]

    def in_blocks(self, x: Tensor, matrix: Tensor) -> Tensor:
        """As `forward`, by matrix products with `matrix()`."""
        length = x.shape[-1]
        # The first sample is repeated 5 times and the last 6; what else is added to the end fills a block.
        padded = F.pad(x, (TAPS // 2 - 1, TAPS // 2 - 1 + -length % (2 * BLOCK)), mode="replicate")
        return _blockwise(padded, matrix, 2 * BLOCK)[..., : length // 2]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 2 T] -> [B, C, T], edge samples repeated."""
        # One depthwise convolution over all channels. The channels as a batch of single ones give the same and
        # take longer.
        num_channels = x.shape[1]
        padded = F.pad(x, (TAPS // 2 - 1, TAPS // 2), mode="replicate")
        return F.conv1d(padded, self.filter.repeat(num_channels, 1, 1), stride=2, groups=num_channels)


class Downsample(nn.Module):
    """Halves the rate; the filter is in `lowpass`, as its checkpoint name says."""

    def __init__(self) -> None:
        super().__init__()
        self.lowpass = LowPass()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 2 T] -> [B, C, T]."""
        return self.lowpass(x)


class Upsample(nn.Module):
    """Doubles the rate: zeros between the samples, then the filter with gain 2."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", kaiser_sinc_filter()[None, None])

    def matrix(self) -> Tensor:
        """The filter on BLOCK samples and 3 on either side, of which it makes 2 BLOCK: [BLOCK + 6, 2 BLOCK]."""
        units = torch.eye(BLOCK + TAPS // 2, dtype=self.filter.dtype, device=self.filter.device)[:, None]
        return F.conv_transpose1d(units, 2 * self.filter, stride=2, padding=TAPS - 1)[:, 0]

    def in_blocks(self, x: Tensor, matrix: Tensor) -> Tensor:
        """As `forward`, by matrix products with `matrix()`."""
        length = x.shape[-1]
        padded = F.pad(x, (TAPS // 4, TAPS // 4 + -length % BLOCK), mode="replicate")
        return _blockwise(padded, matrix, BLOCK)[..., : 2 * length]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, 2 T], edge samples repeated."""
        num_channels = x.shape[1]
        # A sample reaches 6 new ones on either side, so 3 repeated samples an edge are all that the kept part sees;
        # `padding` drops the rest: the (12 - 1) that a transposed convolution adds.
        padded = F.pad(x, (TAPS // 4, TAPS // 4), mode="replicate")
        gain_2 = 2 * self.filter.repeat(num_channels, 1, 1)
        return F.conv_transpose1d(padded, gain_2, stride=2, padding=TAPS - 1, groups=num_channels)


class AntiAliasedSnakeBeta(nn.Module):
    """Doubled rate, snakebeta, original rate."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.act = SnakeBeta(num_channels)
        self.upsample = Upsample()
        self.downsample = Downsample()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        if x.device.type != "cpu":
            return self.downsample(self.act(self.upsample(x)))
        return self._few_channels_at_once(x)

    def _few_channels_at_once(self, x: Tensor) -> Tensor:
        lowpass = self.downsample.lowpass
        up, down = self.upsample.matrix(), lowpass.matrix()
        at_once = max(1, CACHED_SAMPLES // (x.shape[0] * x.shape[2]))
        parts = zip(x.split(at_once, dim=1), *(scale.split(at_once) for scale in self.act.scales()), strict=True)
        activated = [
            lowpass.in_blocks(snake(self.upsample.in_blocks(part, up), frequency, height), down)
            for part, frequency, height in parts
        ]
        return torch.cat(activated, dim=1)
