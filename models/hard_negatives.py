"""Sounds that almost belong to a picture: edits of a clip's own log-mel, and clips made of two.

A contrastive model that tells clips apart can still be blind among sounds for ONE clip, which is what a reward has to
rank. So every picture also meets its own sound with something wrong: a stretch or a band exchanged with another
clip's, faded out, mixed with another clip, moved in time, transposed, or its halves swapped. Only what any corpus
gives is used: no event labels. Splices must not be a cue by themselves, so real pairs are spliced as well
(`join_two_clips`).

Sound is log-mel power, log(power + 1e-5), [B, M, T]. The partner of a sample is the one half a batch further on: with
samples dealt out in turn it is on the same rank for every number of ranks, as long as each rank has an even number.
All randomness comes in as uniform numbers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EDIT_DRAWS = 8
"""Uniform numbers that one edit takes."""
JOIN_DRAWS = 4
"""Uniform numbers that joining two clips takes."""
FLOOR = 1e-5
"""Added to the mel power before the logarithm."""
MOVE_COLUMNS = (4, 16)
"""A moved sound is early or late by 62.5 to 250 ms."""
TRANSPOSE_BINS = (2, 8)
STRETCH_S = (0.2, 0.8)
"""Length of an edited stretch of time."""
COLUMNS_PER_S = 64
BAND_SHARE = (0.2, 0.6)
"""Share of the mel bins in an edited band."""
QUIET_QUANTILE = 0.1
SIDE_GAIN_DB = 6.0
MIX_DB = 12.0
FADE_DB = (6.0, 30.0)
CHANGED_NATS, CHANGED_COLUMNS = 0.15, 3
"""An edit is wrong if so many columns changed by so much on average: silence exchanged for silence is not."""

BACKGROUND_BANDS, BACKGROUND_TIMES = 8, 10
BACKGROUND_DRAWS = 1 + BACKGROUND_BANDS + BACKGROUND_TIMES
"""Uniform numbers that one background takes."""
BACKGROUND_NATS = (-13.0, -6.0)
BACKGROUND_SPREAD_NATS = 3.0

EDITS = ("exchange", "fade", "mix", "move", "transpose", "double", "swap")


@dataclass(frozen=True)
class Edited:
    """Edited sounds [B, M, T] and whether they differ enough from the real ones to be called wrong [B]."""

    log_mel: Tensor
    is_wrong: Tensor


def partner(x: Tensor) -> Tensor:
    """Return for each sample [B, ...] the one half a batch further on."""
    return torch.roll(x, x.shape[0] // 2, dims=0)


def _between(u: Tensor, bounds: tuple[float, float]) -> Tensor:
    return bounds[0] + u * (bounds[1] - bounds[0])


def _signed_steps(u: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Uniform u [B] in [0, 1) -> an integer of either sign with magnitude in `bounds`, inclusive."""
    count = bounds[1] - bounds[0] + 1
    index = (u * 2 * count).long()
    return torch.where(index < count, bounds[0] + index, -(bounds[0] + index - count))


def _shifted(log_mel: Tensor, steps: Tensor, dim: int) -> Tensor:
    """Shift each [M, T] by its steps along dim 1 or 2, repeating the edge."""
    length = log_mel.shape[dim]
    index = (torch.arange(length, device=log_mel.device)[None] - steps[:, None]).clamp(0, length - 1)
    index = index[:, :, None] if dim == 1 else index[:, None, :]
    return torch.gather(log_mel, dim, index.expand(log_mel.shape))


def _interval(u_length: Tensor, u_start: Tensor, length: int, bounds: tuple[float, float]) -> Tensor:
    """Boolean [B, length]: an interval of random extent and place."""
    extent = _between(u_length, bounds).clamp(max=length)
    start = u_start * (length - extent)
    position = torch.arange(length, device=u_length.device)[None] + 0.5
    return (position >= start[:, None]) & (position < (start + extent)[:, None])


def mix_power(log_mel: Tensor, other: Tensor, gain_db: Tensor) -> Tensor:
    """Log-mel of the sum of two independent sounds, the second with a gain in dB, broadcast."""
    power = (log_mel.exp() - FLOOR).clamp(min=0) + 10 ** (gain_db / 10) * (other.exp() - FLOOR).clamp(min=0)
    return torch.log(power + FLOOR)


def apply_gain(log_mel: Tensor, gain_db: Tensor) -> Tensor:
    """Log-mel [B, M, T] of the sound with a gain [B] in dB."""
    power = (log_mel.exp() - FLOOR).clamp(min=0) * 10 ** (gain_db[:, None, None] / 10)
    return torch.log(power + FLOOR)


def add_background(log_mel: Tensor, u: Tensor) -> Tensor:
    """Add a faint blocky background to each sound [B, M, T], from uniform numbers u [B, BACKGROUND_DRAWS].

    A codec's or a sampler's rendering of silence is no part of what a reward should judge: its level is random, around
    that of a recording's own noise and some way above it, and varies with frequency and with time.
    """
    num_mels, length = log_mel.shape[1:]
    u_bands, u_times = u[:, 1 : 1 + BACKGROUND_BANDS], u[:, 1 + BACKGROUND_BANDS :]
    bands = F.interpolate(u_bands[:, None], num_mels, mode="nearest")[:, 0] - 0.5
    times = F.interpolate(u_times[:, None], length, mode="nearest")[:, 0] - 0.5
    level = _between(u[:, 0], BACKGROUND_NATS)[:, None, None]
    background = level + BACKGROUND_SPREAD_NATS * (bands[:, :, None] + times[:, None, :])
    return torch.logaddexp(log_mel, background)


def edit_sound(log_mel: Tensor, u: Tensor) -> Edited:
    """Make one wrong version of each sound [B, M, T] from uniform numbers u [B, EDIT_DRAWS].

    The kind of edit is drawn first. Where: half of the edits act on all frequencies of a stretch of time, a quarter on
    a band at all times, a quarter on a band of a stretch; a swap acts on everything, a move half of the time.
    """
    num_mels, length = log_mel.shape[1:]
    kind = (u[:, 0] * len(EDITS)).long()
    stretch_bounds = (STRETCH_S[0] * COLUMNS_PER_S, STRETCH_S[1] * COLUMNS_PER_S)
    band_bounds = (BAND_SHARE[0] * num_mels, BAND_SHARE[1] * num_mels)
    all_bands, all_times = u[:, 1] < 0.5, u[:, 1] >= 0.75
    times = _interval(u[:, 2], u[:, 3], length, stretch_bounds) | all_times[:, None]
    bands = _interval(u[:, 4], u[:, 5], num_mels, band_bounds) | all_bands[:, None]
    where = times[:, None, :] & bands[:, :, None]

    other = partner(log_mel)
    quiet = torch.quantile(log_mel, QUIET_QUANTILE, dim=2, keepdim=True)
    softer = apply_gain(log_mel, -_between(u[:, 6], FADE_DB))
    transposed = _shifted(log_mel, _signed_steps(u[:, 6], TRANSPOSE_BINS), dim=1)
    sources = torch.stack(
        [
            other,
            torch.minimum(torch.maximum(softer, quiet), log_mel),
            mix_power(log_mel, other, -MIX_DB * u[:, 6, None, None]),
            _shifted(log_mel, _signed_steps(u[:, 6], MOVE_COLUMNS), dim=2),
            transposed,
            mix_power(log_mel, transposed, -MIX_DB * u[:, 7, None, None]),
            torch.roll(log_mel, length // 2, dims=2),
        ]
    )
    source = sources[kind, torch.arange(len(kind), device=kind.device)]
    where = where | (kind == EDITS.index("swap"))[:, None, None]
    # A whole-sound move is the commonest fault of a generator: half of the moves are of everything.
    where = where | ((kind == EDITS.index("move")) & (u[:, 7] < 0.5))[:, None, None]
    edited = torch.where(where, source, log_mel)
    change = (edited - log_mel).abs().mean(dim=1)
    return Edited(edited, (change > CHANGED_NATS).sum(dim=1) >= CHANGED_COLUMNS)


def join_two_clips(frames: Tensor, log_mel: Tensor, u: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
    """Turn some samples into clips of two: frames [B, T, 3, H, W], log-mel [B, M, k * T], u [B, JOIN_DRAWS].

    With `probability` [B]: half of the time the partner's clip takes over at a cut (the same in both modalities, at
    30 to 70 %), half of the time both play at once, pictures side by side, the partner's sound 0 to 6 dB softer.
    """
    num_frames, columns = frames.shape[1], log_mel.shape[2]
    is_cut = u[:, 0] < probability / 2
    is_side = (u[:, 0] >= probability / 2) & (u[:, 0] < probability)
    cut_frame = (num_frames * _between(u[:, 1], (0.3, 0.7))).long()
    late_frames = torch.arange(num_frames, device=u.device)[None] >= cut_frame[:, None]
    late_columns = torch.arange(columns, device=u.device)[None] >= cut_frame[:, None] * (columns // num_frames)
    other_frames, other_mel = partner(frames), partner(log_mel)
    take_frames = (is_cut[:, None] & late_frames)[:, :, None, None, None]
    joined_frames = torch.where(take_frames, other_frames, frames)
    joined_mel = torch.where((is_cut[:, None] & late_columns)[:, None, :], other_mel, log_mel)
    if bool(is_side.any()):
        side = torch.cat([_half_width(frames[is_side]), _half_width(other_frames[is_side])], dim=-1)
        joined_frames[is_side] = side
        gain_db = -SIDE_GAIN_DB * u[is_side, 2, None, None]
        joined_mel[is_side] = mix_power(log_mel[is_side], other_mel[is_side], gain_db)
    return joined_frames, joined_mel


def _half_width(frames: Tensor) -> Tensor:
    """Squeeze frames [B, T, 3, H, W] to half their (even) width."""
    return (frames[..., 0::2] + frames[..., 1::2]) / 2
