"""Sound <-> latents. The codec of the demo world needs no training: log-mel patches and their inversion.

Legend: B clips, S samples, N latent tokens, C channels, M mel bins, F mel frames, K frequency bins.
"""

import math
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.mel import MEL_CONFIGS, LogMel
from models.spec import SPECS, ClipSpec

INVERSION_STEPS = 24
PHASE_STEPS = 8
PHASE_SEED = 0


class Codec(Protocol):
    """Turns the sound of clips of one spec into latents and back."""

    spec: ClipSpec

    def encode(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] float32 in [-1, 1] -> mean and standard deviation of the posterior, both [B, N, C]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[B, N, C] -> [B, S] float32."""
        ...


def build_codec(
    spec_name: str, device: torch.device | str = "cpu", weights: Path | None = None, *, decoding: bool = True
) -> Codec:
    """The codec of a clip spec.

    Args:
        spec_name: a name of `models.spec.SPECS`.
        device: where it works.
        weights: folder of its networks; `tiny` has none.
        decoding: whether sound is to be made, too; without it a named spec's vocoder is not loaded.

    Raises:
        ValueError: no such spec, or its networks are not in the folder.
    """
    if spec_name not in SPECS:
        raise ValueError(f"no clip spec '{spec_name}'; known are {', '.join(SPECS)}")
    if spec_name == "tiny":
        return MelPatchCodec(SPECS[spec_name]).to(device).eval()
    from models.pretrained import load_codec

    return load_codec(SPECS[spec_name], weights, device, decoding=decoding)


class MelPatchCodec(nn.Module):
    """Latents are the log-mel spectrogram itself, some frames a token; the standard deviation is 0.

    Decoding is deterministic: a non-negative power spectrum whose mel is the given one, then Griffin-Lim (Griffin and
    Lim 1984) from a fixed initial phase. The loss of it is one of fine structure, not of time or pitch.
    """

    phase: Tensor
    envelope: Tensor

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        config = MEL_CONFIGS[spec.name]
        assert spec.latent_dim == config.num_mels * spec.mel_frames_per_latent, f"spec {spec.name} is no mel patch"
        self.spec = spec
        self.log_mel = LogMel(config)
        shape = (config.n_fft // 2 + 1, spec.num_samples // config.hop + 1)
        # Random but always the same. Drawn on the CPU, so that every device starts alike; phases that advance like
        # steady tones were tried and make noise crackle.
        turns = torch.rand(shape, generator=torch.Generator().manual_seed(PHASE_SEED))
        phase = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
        self.register_buffer("phase", phase, persistent=False)
        squares = self.log_mel.window.square().expand(1, shape[1], -1)
        self.register_buffer("envelope", overlap_add(squares, config.hop), persistent=False)

    @torch.no_grad()
    def encode(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] -> ([B, N, C], zeros [B, N, C]); S must be the spec's number of samples."""
        assert wave.shape[1] == self.spec.num_samples, f"{wave.shape[1]} samples, spec has {self.spec.num_samples}"
        patches = rearrange(self.log_mel(wave), "b m (n f) -> b n (f m)", f=self.spec.mel_frames_per_latent)
        return patches, torch.zeros_like(patches)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, N, C] -> [B, S] in [-1, 1]; a sound that goes beyond is brought down as a whole and not clipped."""
        mel = rearrange(latents.float(), "b n (f m) -> b m (n f)", f=self.spec.mel_frames_per_latent)
        magnitude = self._power(mel).sqrt()
        # The frame that `encode` dropped at the end.
        magnitude = torch.cat([magnitude, magnitude[..., -1:]], dim=-1)
        wave = self._griffin_lim(magnitude)
        return wave / wave.abs().amax(dim=1, keepdim=True).clamp_min(1)

    def _power(self, log_mel: Tensor) -> Tensor:
        """[B, M, F] log-mel -> power spectrum [B, K, F] >= 0, by multiplicative updates (Lee and Seung 2001)."""
        # Above e^12 no sound in [-1, 1] can be: keeps what an untrained network emits finite.
        mel = (log_mel.clamp(max=12.0).exp() - self.log_mel.config.floor).clamp_min(0)
        filters = self.log_mel.filters
        target = filters.T @ mel
        power = target / filters.sum(0).clamp_min(1e-6)[:, None]
        for _ in range(INVERSION_STEPS):
            power = power * target / (filters.T @ (filters @ power)).clamp_min(1e-8)
        return power

    def _griffin_lim(self, magnitude: Tensor) -> Tensor:
        c = self.log_mel.config
        spectrum = magnitude * self.phase
        for _ in range(PHASE_STEPS):
            wave = self._inverse_stft(spectrum)
            again = torch.stft(wave, c.n_fft, c.hop, c.window, self.log_mel.window, return_complex=True)
            spectrum = magnitude * again / again.abs().clamp_min(1e-8)
        return self._inverse_stft(spectrum)

    def _inverse_stft(self, spectrum: Tensor) -> Tensor:
        """[B, K, F] -> [B, S], what `torch.istft` gives, in a third of its time on a CPU."""
        c = self.log_mel.config
        frames = torch.fft.irfft(spectrum.transpose(1, 2), c.n_fft) * self.log_mel.window
        wave = overlap_add(frames, c.hop) / self.envelope.clamp_min(1e-11)
        return wave[:, c.n_fft // 2 :][:, : self.spec.num_samples]


def overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Add windows [B, F, W], each `hop` samples after the one before it -> [B, (F + ceil(W / hop) - 1) * hop]."""
    num_frames, width = frames.shape[1:]
    num_pieces = -(-width // hop)
    pieces = F.pad(frames, (0, num_pieces * hop - width)).unflatten(2, (num_pieces, hop))
    total = frames.new_zeros(len(frames), num_frames + num_pieces - 1, hop)
    for piece in range(num_pieces):
        total[:, piece : piece + num_frames] += pieces[:, :, piece]
    return total.flatten(1)
