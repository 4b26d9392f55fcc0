"""What SF-CAVP's encoders see of a batch: crops of picture and sound, and sounds that almost belong to the picture.

Each picture crop meets two crops of its own sound: one with an independent, known offset, from which the offset is to
be told (so that neither tower can solve the task from positions), and an aligned one, which must be preferred to worse
and worse versions of itself. Those versions are edits (`models.hard_negatives`) or, where a sample brings some, what a
generator made of the sound (`Degraded`): a reward that has to rank a generator's sounds learns from its faults.

All randomness is in one tensor of uniform numbers, a row a sample, drawn by `draw_uniforms` from the sample's own
generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from models.crops import CropPlan, cut, plan_crops
from models.hard_negatives import (
    BACKGROUND_DRAWS,
    EDIT_DRAWS,
    JOIN_DRAWS,
    add_background,
    apply_gain,
    edit_sound,
    join_two_clips,
)
from models.sf_cavp import MEL_STRIDE, SFCAVP, normalise_loudness

GAIN_JITTER_DB = 6.0


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Crops, weights and augmentation; lengths in fast steps (1/16 s)."""

    crop_steps: int
    max_offset_steps: int
    """Greatest offset between the two crops, either way; the classes of the timing loss."""
    offset_grid: int
    """Offsets are multiples of this."""
    num_crops: int = 1
    min_crop_distance: int = 32
    """Least distance between the starts of two crops of one video."""
    num_edits: int = 3
    """Wrong versions of its own sound that each picture meets."""
    join_probability: float = 0.3
    easy_samples: int = 0
    """How many samples of a run are plain: no edits, no background, no joined clips. A fresh network that meets them at
    once stays for hundreds of steps where it tells nothing apart."""
    ramp_samples: int = 0
    """Over how many samples after those the hard ones become the rule."""
    temporal_form: Literal["offset", "segment"] = "offset"
    temporal_weight: float = 1.0
    ranking_weight: float = 1.0
    label_smoothing: float = 0.2
    """Share of the offset's label that goes to the two neighbouring grid bins."""
    segment_steps: int = 8
    """Length of a segment of the `segment` form: 0.5 s."""

    @property
    def hard_from(self) -> int:
        """Position from which every sample is hard."""
        return self.easy_samples + max(self.ramp_samples, 1)

    @property
    def num_draws(self) -> int:
        """Uniform numbers that one sample takes."""
        return (
            1
            + JOIN_DRAWS
            + self.num_crops * (3 + self.num_edits * EDIT_DRAWS + (self.num_edits + 2) * BACKGROUND_DRAWS)
        )


_TINY = LossConfig(crop_steps=24, max_offset_steps=12, offset_grid=1, easy_samples=150 * 32, ramp_samples=60 * 32)
LOSS_CONFIGS: dict[str, LossConfig] = {
    "tiny": _TINY,
    "tiny_wide": _TINY,
    "base": LossConfig(crop_steps=64, max_offset_steps=32, offset_grid=2, num_crops=3),
}
"""The losses by model size: tiny for clips of 2.5 s, base for 8 s and longer."""


def draw_uniforms(generators: Sequence[torch.Generator], positions: Sequence[int], config: LossConfig) -> Tensor:
    """Draw everything that is random about each sample, from its own generator: [B, num_draws] in [0, 1).

    `positions` count the samples of the run; from them the first number becomes 1 for a hard sample, 0 for an easy one.
    """
    u = torch.stack([torch.rand(config.num_draws, generator=generator) for generator in generators])
    done = torch.tensor(positions, dtype=torch.float64) - config.easy_samples
    u[:, 0] = (u[:, 0] < (done / max(config.ramp_samples, 1)).clamp(0, 1)).float()
    return u


@dataclass(frozen=True)
class TrainingViews:
    """What the encoders see of a batch; B counts crops, K edits; log-mels are [B, M, T]."""

    frames: Tensor
    sounds: Tensor
    """The sound of exactly the picture's crop, then versions that get worse and worse: [B, 1 + K, M, T].

    Where no sample of the batch is hard, the real sound alone: [B, 1, M, T]."""
    is_wrong: Tensor
    """Whether a version counts as worse than the one before it: its sample is hard and it changed enough, [B, K]."""
    is_degraded: Tensor
    """Whether the versions are a generator's and no edits, [B]."""
    offset_mel: Tensor
    """The sound with the plan's offset."""
    offset: Tensor
    """True offset of `offset_mel` in fast steps, [B]."""


@dataclass(frozen=True)
class Degraded:
    """What a generator made of some samples' sounds, which takes the place of their edits."""

    waves: Tensor
    """K versions at 16 kHz, each worse than the one before it, of those samples that bring some: [B', K, S]."""
    is_there: Tensor
    """Whether a sample of the batch does, [B]; B' of them."""


@torch.no_grad()
def make_views(
    model: SFCAVP, frames: Tensor, waves: Tensor, u: Tensor, config: LossConfig, degraded: Degraded | None = None
) -> TrainingViews:
    """Join, crop, edit, re-scale: frames [B, T, 3, H, W] in [0, 1] at 16 fps, waves [B, S] at 16 kHz, u [B, draws].

    A hard sample with `degraded` versions (K of them: `config.num_edits`) is neither joined nor edited; its real sound
    must have come through the same codec as they, or the codec's traces would tell them apart.
    """
    num_crops, num_edits = config.num_crops, config.num_edits
    is_hard, u_join, u_crops = u[:, 0] > 0.5, u[:, 1 : 1 + JOIN_DRAWS], u[:, 1 + JOIN_DRAWS :]
    u_crops = u_crops.reshape(len(u), num_crops, -1)
    takes = is_hard & degraded.is_there if degraded is not None else torch.zeros_like(is_hard)
    frames, log_mel = join_two_clips(
        model.pool_frames(frames),
        model.log_mel(normalise_loudness(waves)),
        u_join,
        config.join_probability * (is_hard & ~takes),
    )
    plan = plan_crops(
        u_crops[:, :, 0],
        u_crops[:, :, 1],
        num_steps=min(frames.shape[1], log_mel.shape[2] // MEL_STRIDE),
        crop_steps=config.crop_steps,
        min_distance=config.min_crop_distance,
        max_offset=config.max_offset_steps,
        grid=config.offset_grid,
    )
    is_hard, u_flat = is_hard.repeat_interleave(num_crops), rearrange(u_crops, "b n d -> (b n) d")
    # One gain for a sample and its versions alike, or loudness would tell them apart.
    gain_db = GAIN_JITTER_DB * (2 * u_flat[:, 2] - 1)
    real = apply_gain(_cut_sound(log_mel, plan.video_start, config), gain_db)
    versions, is_wrong = [real], torch.zeros(len(u_flat), num_edits, dtype=torch.bool, device=u.device)
    if bool(is_hard.any()):
        u_edits = u_flat[:, 3 : 3 + num_edits * EDIT_DRAWS].reshape(len(u_flat), num_edits, EDIT_DRAWS)
        versions, is_wrong = _edits(real, u_edits, is_hard)
    flags = takes.repeat_interleave(num_crops)
    if degraded is not None and bool(takes.any()):
        for k, version in enumerate(_cut_degraded(model, degraded, plan, takes, config), start=1):
            versions[k] = versions[k].clone()
            versions[k][flags] = apply_gain(version, gain_db[flags])
            is_wrong[flags, k - 1] = True
    sounds = [*versions, apply_gain(_cut_sound(log_mel, plan.audio_start, config), gain_db)]
    u_backgrounds = u_flat[:, 3 + num_edits * EDIT_DRAWS :].reshape(len(u_flat), num_edits + 2, BACKGROUND_DRAWS)
    sounds = [
        torch.where(is_hard[:, None, None], add_background(sound, u_backgrounds[:, k]), sound)
        for k, sound in enumerate(sounds)
    ]
    return TrainingViews(
        frames=cut(frames, plan.video_start, config.crop_steps, dim=1),
        sounds=torch.stack(sounds[:-1], dim=1),
        is_wrong=is_wrong,
        is_degraded=flags,
        offset_mel=sounds[-1],
        offset=plan.offset.flatten(),
    )


def _edits(real: Tensor, u: Tensor, is_hard: Tensor) -> tuple[list[Tensor], Tensor]:
    """Real sounds [B, M, T] and, for u [B, K, draws], versions with one more edit each; whether each counts [B, K]."""
    versions, is_wrong = [real], []
    for k in range(u.shape[1]):
        edited = edit_sound(versions[-1], u[:, k])
        versions.append(edited.log_mel)
        is_wrong.append(edited.is_wrong & is_hard)
    return versions, torch.stack(is_wrong, dim=1)


def _cut_degraded(
    model: SFCAVP, degraded: Degraded, plan: CropPlan, takes: Tensor, config: LossConfig
) -> tuple[Tensor, ...]:
    """Versions of the samples `takes` [B], cut where their pictures are: K log-mels [B'' * crops, M, T]."""
    waves = degraded.waves[takes[degraded.is_there]]
    assert waves.shape[1] == config.num_edits, f"{waves.shape[1]} degraded versions, {config.num_edits} are needed"
    log_mel = model.log_mel(normalise_loudness(waves.flatten(0, 1)))
    by_version = rearrange(log_mel, "(b k) m t -> k b m t", k=config.num_edits)
    return tuple(_cut_sound(version, plan.video_start[takes], config) for version in by_version)


def _cut_sound(log_mel: Tensor, start: Tensor, config: LossConfig) -> Tensor:
    return cut(log_mel, start * MEL_STRIDE, config.crop_steps * MEL_STRIDE, dim=2)
