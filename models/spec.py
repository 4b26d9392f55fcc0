"""Durations and rates -> every length and width of a clip.

A `ClipSpec` is the only place where the shape of a row is written down: the contracts, the networks, the codecs and
the encoders all derive their lengths from it, so that no two parts can disagree. Formulas: the sequence lengths of
MMAudio (arXiv 2412.15322) for the named sizes; the tiny spec has the same structure with small numbers.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

TEXT_TOKENS = 77
SYNC_SEGMENT_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """Everything that fixes the shapes of one clip; lengths are properties derived from rates and duration."""

    name: str
    duration_s: float
    sample_rate_hz: int
    """Rate of the codec and of the stored mono audio."""
    mel_hop: int
    """Samples a mel frame."""
    mel_frames_per_latent: int
    latent_dim: int
    """C: channels of one stored latent token."""
    condition_kind: Literal["grids", "clip_synchformer"]
    clip_dim: int
    sync_dim: int
    text_dim: int
    text_len: int
    frames_px: int
    """Side of the square JPEG frames kept for SF-CAVP."""
    frames_rate_hz: int = 16
    """SF-CAVP's fast video rate."""

    @property
    def samples_per_latent(self) -> int:
        """Audio samples of one latent token."""
        return self.mel_hop * self.mel_frames_per_latent

    @property
    def latent_len(self) -> int:
        """N = ceil(T * sr / hop / frames-per-latent): latent tokens of the clip."""
        samples = round(self.duration_s * self.sample_rate_hz)
        return math.ceil(samples / self.samples_per_latent)

    @property
    def num_samples(self) -> int:
        """Audio samples of the clip: a whole number of latent tokens."""
        return self.latent_len * self.samples_per_latent

    @property
    def frames_len(self) -> int:
        """Frames kept for SF-CAVP."""
        return round(self.frames_rate_hz * self.duration_s)

    @property
    def clip_len(self) -> int:
        """Tokens of the semantic video condition: 8 fps, or (mean, max, min) over time for grids."""
        return 3 if self.condition_kind == "grids" else int(8 * self.duration_s)

    @property
    def sync_len(self) -> int:
        """Tokens of the timing condition, always a multiple of 8.

        Synchformer: 8 tokens for every segment of 16 frames with stride 8 at 25 fps. Grids: one token a frame at
        16 fps, in whole segments of 8.
        """
        if self.condition_kind == "grids":
            return self.frames_len // SYNC_SEGMENT_TOKENS * SYNC_SEGMENT_TOKENS
        return SYNC_SEGMENT_TOKENS * (math.floor((25 * self.duration_s - 16) / 8) + 1)

    def with_duration(self, duration_s: float) -> "ClipSpec":
        """Return the same spec for another duration in seconds (> 0)."""
        if duration_s <= 0:
            raise ValueError(f"duration_s must be positive, got {duration_s}")
        return dataclasses.replace(self, duration_s=duration_s)


def _named(name: str, sample_rate_hz: int, mel_hop: int, latent_dim: int) -> ClipSpec:
    return ClipSpec(
        name=name,
        duration_s=8.0,
        sample_rate_hz=sample_rate_hz,
        mel_hop=mel_hop,
        mel_frames_per_latent=2,
        latent_dim=latent_dim,
        condition_kind="clip_synchformer",
        clip_dim=1024,
        sync_dim=768,
        text_dim=1024,
        text_len=TEXT_TOKENS,
        frames_px=224,
    )


SPECS: dict[str, ClipSpec] = {
    "tiny": ClipSpec(
        name="tiny",
        duration_s=2.5,
        sample_rate_hz=16_000,
        mel_hop=250,
        mel_frames_per_latent=4,
        latent_dim=160,
        condition_kind="grids",
        clip_dim=192,
        sync_dim=576,
        text_dim=64,
        text_len=8,
        frames_px=64,
    ),
    "16k": _named("16k", 16_000, 256, 20),
    "44k": _named("44k", 44_100, 512, 40),
}
"""The clip specs by name. `tiny` is the demo world's; `16k` and `44k` are those of the public checkpoints."""
