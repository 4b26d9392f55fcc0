"""Snakebeta, applied at twice the rate between two low-pass filters, so that its harmonics do not fold back as noise.

BigVGAN (arXiv 2206.04658) puts this activation before every convolution. Its two filters are buffers in the public
checkpoints and are therefore buffers here, although each of them is the same twelve numbers.

Legend: B clips, C channels, T samples of a stage.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAPS = 12
"""Length of the filter: 6 taps for each of the two phases of a doubled rate."""

CUTOFF = 0.25
"""Cycles a sample at the doubled rate: the band that the original rate can hold."""

TRANSITION = 0.3
"""Half the width of the transition band, as a part of the sampling rate."""


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

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        frequency = self.alpha.exp()[:, None]
        height = 1 / (self.beta.exp() + 1e-9)[:, None]
        # In place, since these are the largest tensors of the network; autograd keeps copies of its own.
        return torch.addcmul(x, (x * frequency).sin_().square_(), height)


class LowPass(nn.Module):
    """The filter, on every second sample only: halves the rate."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", kaiser_sinc_filter()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 2 T] -> [B, C, T], edge samples repeated."""
        # One depthwise convolution over all channels. The channels as a batch of single ones give the same and
        # take four times as long on a CPU.
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
        return self.downsample(self.act(self.upsample(x)))
