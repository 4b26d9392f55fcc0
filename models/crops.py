"""Where the pictures and the sounds of a training sample are cut, with offsets between the two that are known.

Times are in fast steps of 1/16 s. The offset of a pair of crops is `video_start - audio_start`: what the picture shows
at step t of its crop sounds at step t + offset of the sound's crop.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CropPlan:
    """Starts in fast steps, int64 [B, N]: N crops of each of B clips."""

    video_start: Tensor
    audio_start: Tensor

    @property
    def offset(self) -> Tensor:
        """The true offset of each pair of crops, [B, N]."""
        return self.video_start - self.audio_start


def plan_crops(
    u_start: Tensor, u_offset: Tensor, *, num_steps: int, crop_steps: int, min_distance: int, max_offset: int, grid: int
) -> CropPlan:
    """Plan N crops a clip from uniform numbers [B, N] in [0, 1).

    Starts are uniform among those at least `min_distance` apart (evenly spread where the clip is too short for that);
    each offset is uniform among the multiples of `grid` within `max_offset` that keep the sound's crop in the clip.
    """
    assert num_steps >= crop_steps, f"a clip of {num_steps} steps has no crop of {crop_steps}"
    num_crops = u_start.shape[1]
    last_start = num_steps - crop_steps
    distance = min(min_distance, last_start // (num_crops - 1)) if num_crops > 1 else 0
    slack = last_start - distance * (num_crops - 1)
    order = torch.arange(num_crops, device=u_start.device)
    video_start = (torch.sort(u_start, dim=1).values * (slack + 1)).long() + order * distance
    lowest = -(torch.clamp(last_start - video_start, max=max_offset) // grid)
    highest = torch.clamp(video_start, max=max_offset) // grid
    offset = grid * (lowest + (u_offset * (highest - lowest + 1)).long())
    return CropPlan(video_start, video_start - offset)


def cut(x: Tensor, start: Tensor, length: int, dim: int) -> Tensor:
    """Cut `length` steps of x [B, ...] along `dim` (>= 1) from start [B, N] on: [B * N, ...]."""
    num_clips, num_crops = start.shape
    index = (start[:, :, None] + torch.arange(length, device=x.device)).reshape(num_clips * num_crops, length)
    repeated = x.repeat_interleave(num_crops, dim=0) if num_crops > 1 else x
    index = index.reshape([len(index)] + [1] * (dim - 1) + [length] + [1] * (x.ndim - dim - 1))
    shape = list(repeated.shape)
    shape[dim] = length
    return torch.gather(repeated, dim, index.expand(shape))
