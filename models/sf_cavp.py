"""SF-CAVP: two SlowFast encoders, for picture and for sound, whose outputs live on one clock.

Slow vectors come at 4 Hz and say *what* happens, fast vectors at 16 Hz and say *when*: step i of either modality is
the time i / rate. Picture: 16 frames a second, time is never strided. Sound: 16 kHz, a mel column every 250 samples
(64 Hz), time strided by 4. Everything is convolutional in time: a model trained on short crops scores longer clips.

Vectors are returned un-normalised; `clip_vector` and `offset_similarity` define how they are compared. The modalities
share no weights and never meet inside a trunk: a clip's picture is encoded once, and any number of sounds is scored
against it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from models.mel import LogMel, sf_cavp_mel
from models.slowfast import SlowFast, TrunkConfig, base_trunk, fitting, tiny_trunk

VIDEO_RATE_HZ = 16
SAMPLE_RATE_HZ = 16_000
MEL_STRIDE = 4
"""Mel columns for one fast step of the audio trunk."""
SAMPLES_PER_STEP = SAMPLE_RATE_HZ // VIDEO_RATE_HZ
PIXEL_MEAN, PIXEL_STD = 0.45, 0.225
TARGET_RMS = 0.05
FAR_STEPS = 4
"""Shifts of 0.25 s and more are what S_tmp compares with."""
INITIAL_SCALE, MAX_SCALE = 1 / 0.07, 100.0
"""Temperature of the contrastive losses: as in CLIP and Diff-Foley's CAVP."""


class Streams(NamedTuple):
    """Un-normalised vectors of a batch: slow [B, Ts, Ds] at 4 Hz, fast [B, Tf, Df] at 16 Hz."""

    slow: Tensor
    fast: Tensor


@dataclass(frozen=True, kw_only=True)
class SFCAVPConfig:
    """One size of SF-CAVP."""

    video: TrunkConfig
    audio: TrunkConfig
    frame_px: int
    """Side of the pictures that the trunk sees; larger frames are average-pooled to it."""
    num_mels: int
    slow_hidden: int
    slow_dim: int
    fast_hidden: int
    fast_dim: int
    audio_position_bins: int = 0
    """Bands of the mel axis that the heads of the audio encoder see apart; must divide the trunk's last map."""


def _tiny(fast_scale: int) -> SFCAVPConfig:
    return SFCAVPConfig(
        video=tiny_trunk("video", fast_scale),
        audio=tiny_trunk("audio", fast_scale),
        frame_px=32,
        num_mels=64,
        slow_hidden=128,
        slow_dim=128,
        fast_hidden=64,
        fast_dim=64,
        audio_position_bins=4,
    )


SF_CAVP_SIZES: dict[str, SFCAVPConfig] = {
    "tiny": _tiny(fast_scale=1),
    "tiny_wide": _tiny(fast_scale=2),
    "base": SFCAVPConfig(
        video=base_trunk("video"),
        audio=base_trunk("audio"),
        frame_px=112,
        num_mels=128,
        slow_hidden=512,
        slow_dim=512,
        fast_hidden=256,
        fast_dim=256,
    ),
}
"""The sizes by name. `base` is paper scale; `tiny` trains in minutes on two CPU cores (425,234 parameters). `tiny_wide`
(597,602), whose fast pathway is twice as wide, ranks better and takes half as long again a step."""


class Encoder(nn.Module):
    """A trunk and its heads.

    The fast head sees mean, maximum and deviation over space, so that no flash drowns. With `position_bins` both heads
    also see that many bands of the last axis apart: a shallow trunk that only averages over frequency cannot tell a
    high tone from a low one, a deep one has learned it from the borders by then.
    """

    def __init__(self, trunk: TrunkConfig, config: SFCAVPConfig, position_bins: int = 0) -> None:
        super().__init__()
        self.position_bins = position_bins
        # Channels-last kernels are a fifth faster on CPUs; the values are the same.
        self.memory_format = torch.channels_last_3d if trunk.space_dims == 2 else torch.channels_last
        self.trunk = SlowFast(trunk)
        self.trunk.to(memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]
        self.slow_head = nn.Sequential(
            nn.Linear((1 + position_bins) * trunk.slow_out, config.slow_hidden),
            nn.GELU(),
            nn.Linear(config.slow_hidden, config.slow_dim),
        )
        # Without biases: a constant part of every fast vector would only raise all offsets' similarities alike.
        self.fast_head = nn.Sequential(
            nn.Linear((3 + position_bins) * trunk.fast_out, config.fast_hidden, bias=False),
            nn.GELU(),
            nn.Linear(config.fast_hidden, config.fast_dim, bias=False),
        )

    def forward(self, x: Tensor) -> Streams:
        """[B, C, T, space...] -> Streams."""
        slow, fast = self.trunk(x.contiguous(memory_format=self.memory_format))
        slow, fast = (rearrange(stream, "b c t ... -> b t c (...)") for stream in (slow, fast))
        deviation = torch.sqrt(fast.var(dim=-1, unbiased=False) + 1e-5)
        pooled_slow = [slow.mean(dim=-1), *self._bands(slow)]
        pooled_fast = [fast.mean(dim=-1), fast.amax(dim=-1), deviation, *self._bands(fast)]
        return Streams(self.slow_head(torch.cat(pooled_slow, dim=-1)), self.fast_head(torch.cat(pooled_fast, dim=-1)))

    def _bands(self, stream: Tensor) -> tuple[Tensor, ...]:
        """[B, T, C, F] -> the means of `position_bins` bands of F, each [B, T, C]."""
        if self.position_bins == 0:
            return ()
        banded = reduce(stream, "b t c (p f) -> p b t c", "mean", p=self.position_bins)
        return tuple(banded.unbind())


class SFCAVP(nn.Module):
    """Both encoders and the learned scales of the losses.

    `mel_mean` and `mel_std` [num_mels] are buffers, fitted on training sound before the first step (`fit`).
    """

    mel_mean: Tensor
    mel_std: Tensor

    def __init__(self, config: SFCAVPConfig) -> None:
        super().__init__()
        self.config = config
        self.video = Encoder(config.video, config)
        self.audio = Encoder(config.audio, config, config.audio_position_bins)
        self.mel = LogMel(sf_cavp_mel(config.num_mels))
        self.register_buffer("mel_mean", torch.zeros(config.num_mels))
        self.register_buffer("mel_std", torch.ones(config.num_mels))
        # Of shape [1]: DeepSpeed cannot broadcast a parameter without dimensions.
        self.log_scale_slow = nn.Parameter(torch.tensor([math.log(INITIAL_SCALE)]))
        self.log_scale_fast = nn.Parameter(torch.tensor([math.log(INITIAL_SCALE)]))

    def scales(self) -> tuple[Tensor, Tensor]:
        """Return the learned scales (slow, fast), at most 100."""
        slow, fast = (
            log_scale.exp().clamp(max=MAX_SCALE).squeeze() for log_scale in (self.log_scale_slow, self.log_scale_fast)
        )
        return slow, fast

    def pool_frames(self, frames: Tensor) -> Tensor:
        """Average-pool frames [B, T, 3, H, W], of any scale, to the trunk's square size; no enlarging."""
        assert frames.ndim == 5, tuple(frames.shape)
        side = self.config.frame_px
        assert min(frames.shape[-2:]) >= side, f"frames {tuple(frames.shape[-2:])} are smaller than {side} px"
        if frames.shape[-2:] == (side, side):
            return frames
        height, width = frames.shape[-2:]
        frames_of_all = rearrange(frames, "b t c h w -> (b t) c h w")
        if height % side or width % side:
            pooled = F.adaptive_avg_pool2d(frames_of_all, side)
        else:
            # The same averages; torch's adaptive pooling is several times slower on a CPU.
            pooled = F.avg_pool2d(frames_of_all, (height // side, width // side))
        return rearrange(pooled, "(b t) c h w -> b t c h w", b=frames.shape[0])

    def encode_video(self, frames: Tensor) -> Streams:
        """Encode frames [B, T, 3, H, W] in [0, 1] at 16 fps -> slow [B, ceil(T/4), Ds], fast [B, T, Df]."""
        x = (self.pool_frames(frames) - PIXEL_MEAN) / PIXEL_STD
        return self.video(rearrange(x, "b t c h w -> b c t h w"))

    def log_mel(self, waves: Tensor) -> Tensor:
        """Log-mel of waves [B, S] at 16 kHz, S >= 1024: [B, num_mels, S // 250], the last centred column dropped."""
        return self.mel(waves)

    def encode_mel(self, log_mel: Tensor) -> Streams:
        """Encode log-mel [B, num_mels, T] at 64 Hz -> slow [B, ceil(T/16), Ds], fast [B, ceil(T/4), Df]."""
        normalised = (log_mel - self.mel_mean[:, None]) / self.mel_std[:, None]
        return self.audio(rearrange(normalised, "b f t -> b 1 t f"))

    def encode_audio(self, waves: Tensor) -> Streams:
        """Encode waves [B, S] at 16 kHz -> Streams."""
        return self.encode_mel(self.log_mel(waves))

    @torch.no_grad()
    def fit(self, frames: Tensor, waves: Tensor) -> None:
        """Fit all statistics that training does not change: per-bin mean and deviation, and every `FittedNorm`.

        Call it once, before the first step, with the same real clips on every rank (some dozens will do): frames
        [B, T, 3, H, W] in [0, 1], waves [B, S] at 16 kHz.
        """
        waves = normalise_loudness(waves)
        log_mel = self.log_mel(waves).double()
        self.mel_mean.copy_(log_mel.mean(dim=(0, 2)))
        self.mel_std.copy_(log_mel.std(dim=(0, 2)).clamp(min=1e-2))
        with fitting(self):
            self.encode_video(frames)
            self.encode_audio(waves)


def clip_vector(slow: Tensor) -> Tensor:
    """Unit vector of a clip: normalise(mean + max over time), [..., T, D] -> [..., D].

    The maximum keeps a brief event visible in a clip of many, the mean keeps the bed.
    """
    return F.normalize(slow.mean(dim=-2) + slow.amax(dim=-2), dim=-1)


def semantic_similarity(video_slow: Tensor, audio_slow: Tensor) -> Tensor:
    """S_sem, [B, T, D] x [B, T, D] -> [B]: half the cosine of the clip vectors, half the mean of the steps' cosines.

    Pooled vectors tell what sounds at all; a sound too many or too few, which pooling hides, shows where the steps are
    compared each with its own (late interaction).
    """
    pooled = (clip_vector(video_slow) * clip_vector(audio_slow)).sum(dim=-1)
    by_step = (F.normalize(video_slow, dim=-1) * F.normalize(audio_slow, dim=-1)).sum(dim=-1).mean(dim=-1)
    return (pooled + by_step) / 2


def offset_similarity(video_fast: Tensor, audio_fast: Tensor, offsets: Tensor) -> Tensor:
    """S(d) = mean over valid t of <v_t, a_(t+d)> with unit vectors: [B, T, D] x [B, U, D] -> [B, len(offsets)].

    `offsets` are fast steps (62.5 ms), positive where the sound is late; each must leave at least one valid t.
    """
    products = torch.einsum("btd,bud->btu", F.normalize(video_fast, dim=-1), F.normalize(audio_fast, dim=-1))
    t = torch.arange(products.shape[1], device=offsets.device)
    u = torch.arange(products.shape[2], device=offsets.device)
    on_diagonal = (u[None, None] - t[None, :, None] == offsets[:, None, None]).to(products.dtype)
    return torch.einsum("btu,otu->bo", products, on_diagonal / on_diagonal.sum(dim=(1, 2), keepdim=True))


def temporal_contrast(similarity: Tensor, offsets: Tensor) -> Tensor:
    """S_tmp = S(0) - mean of S(d) over |d| >= 0.25 s: similarity [B, n] at offsets [n] with 0 among them -> [B].

    S(0) alone is high for any steady match, and would measure the semantics once more.
    """
    return similarity[:, offsets == 0][:, 0] - similarity[:, offsets.abs() >= FAR_STEPS].mean(dim=1)


def normalise_loudness(waves: Tensor) -> Tensor:
    """Bring each sound [..., S] to an RMS of -26 dBFS, so that nothing downstream can see its gain; silence stays."""
    rms = waves.double().square().mean(dim=-1, keepdim=True).sqrt()
    gain = torch.where(rms > 1e-9, TARGET_RMS / rms.clamp(min=1e-9), torch.ones_like(rms))
    return (waves.double() * gain).to(waves.dtype)


def parameter_groups(model: SFCAVP, weight_decay: float) -> list[dict[str, object]]:
    """Optimiser groups: weight decay on matrices and kernels, none on norms, biases and the learned scales."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
