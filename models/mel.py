"""Log-mel spectrograms: one module, and the settings of each front end that the project uses.

All STFTs use a periodic Hann window. Legend: B clips, S samples, M mel bins, F frames.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks


@dataclass(frozen=True, kw_only=True)
class MelConfig:
    """Settings of a log-mel spectrogram."""

    sample_rate_hz: int
    n_fft: int
    window: int
    hop: int
    num_mels: int
    min_hz: float
    max_hz: float
    scale: Literal["slaney", "htk"]
    """`slaney` also divides each filter by its width; `htk` leaves peaks of 1."""
    padding: Literal["codec", "centre"]
    """`codec`: reflect (n_fft - hop) / 2 on both sides, S / hop frames, frame k is centred on (k + 1/2) hop.
    `centre`: reflect n_fft / 2 and drop the last frame, S / hop frames, frame k is centred on k hop."""
    spectrum: Literal["magnitude", "power"]
    """`magnitude` is sqrt(re^2 + im^2 + 1e-9)."""
    floor: float
    """`magnitude`: the smallest mel value, by clamping. `power`: added before the logarithm."""
    log: Literal["log10", "ln"]


def _codec_config(sample_rate_hz: int, n_fft: int, num_mels: int, log: Literal["log10", "ln"]) -> MelConfig:
    return MelConfig(
        sample_rate_hz=sample_rate_hz,
        n_fft=n_fft,
        window=n_fft,
        hop=n_fft // 4,
        num_mels=num_mels,
        min_hz=0.0,
        max_hz=sample_rate_hz / 2,
        scale="slaney",
        padding="codec",
        spectrum="magnitude",
        floor=1e-5,
        log=log,
    )


def sf_cavp_mel(num_mels: int) -> MelConfig:
    """SF-CAVP's front end: 25 ms windows every 250 samples, so that frame 4 i falls on video frame i at 16 fps."""
    return MelConfig(
        sample_rate_hz=16_000,
        n_fft=1024,
        window=400,
        hop=250,
        num_mels=num_mels,
        min_hz=0.0,
        max_hz=8000.0,
        scale="slaney",
        padding="centre",
        spectrum="power",
        floor=1e-5,
        log="ln",
    )


MEL_CONFIGS: dict[str, MelConfig] = {
    "16k": _codec_config(16_000, 1024, 80, "log10"),
    "44k": _codec_config(44_100, 2048, 128, "ln"),
    "tiny": MelConfig(
        sample_rate_hz=16_000,
        n_fft=512,
        window=512,
        hop=250,
        num_mels=40,
        min_hz=60.0,
        max_hz=8000.0,
        scale="htk",
        padding="centre",
        spectrum="power",
        floor=1e-2,
        log="ln",
    ),
}
"""The codecs' front ends by spec name: those of MMAudio's two VAEs, and the demo world's."""


def mel_filters(config: MelConfig) -> Tensor:
    """Triangular filters [M, n_fft / 2 + 1] float32."""
    filters = melscale_fbanks(
        config.n_fft // 2 + 1,
        config.min_hz,
        config.max_hz,
        config.num_mels,
        config.sample_rate_hz,
        norm="slaney" if config.scale == "slaney" else None,
        mel_scale=config.scale,
    )
    return filters.T.contiguous()


class LogMel(nn.Module):
    """Waveform -> log-mel spectrogram. Has no parameters; its buffers are not part of any checkpoint."""

    filters: Tensor
    window: Tensor

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("filters", mel_filters(config), persistent=False)
        self.register_buffer("window", torch.hann_window(config.window), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """[B, S] float32, clamped to [-1, 1] -> [B, M, S // hop].

        S must be at least n_fft, so that the reflected edges exist.
        """
        c = self.config
        assert wave.ndim == 2, f"wave is {tuple(wave.shape)}, expected [B, S]"
        assert wave.shape[1] >= c.n_fft, f"{wave.shape[1]} samples are fewer than n_fft {c.n_fft}"
        wave = wave.clamp(-1, 1)
        pad = (c.n_fft - c.hop) // 2 if c.padding == "codec" else c.n_fft // 2
        wave = F.pad(wave[:, None], (pad, pad), mode="reflect")[:, 0]
        spectrum = torch.stft(wave, c.n_fft, c.hop, c.window, self.window, center=False, return_complex=True)
        if c.padding == "centre":
            spectrum = spectrum[..., : (wave.shape[1] - 2 * pad) // c.hop]
        power = spectrum.real.square() + spectrum.imag.square()
        if c.spectrum == "magnitude":
            mel = (self.filters @ (power + 1e-9).sqrt()).clamp_min(c.floor)
        else:
            mel = self.filters @ power + c.floor
        return mel.log10() if c.log == "log10" else mel.log()
