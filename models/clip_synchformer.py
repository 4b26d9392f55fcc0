"""The conditions of the named sizes: CLIP at 8 frames a second, Synchformer at 25, and CLIP's words.

Both encoders see each frame or segment by itself, so frames that are exactly alike (a still picture, a padded end, a
slow camera) are encoded once.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from models.encoders import VideoGrid
from models.spec import SYNC_SEGMENT_TOKENS, ClipSpec
from models.synchformer import FRAME_PX, SEGMENT_FRAMES, SEGMENT_STRIDE, Synchformer, segment_frames

if TYPE_CHECKING:
    from models.clip import FrozenCLIP

CLIP_RATE_HZ, CLIP_PX = 8, 384
SYNC_RATE_HZ = 25
FRAMES_AT_ONCE, SEGMENTS_AT_ONCE = 16, 4
"""How much is in a network at one time: bounds its memory."""


class ClipSynchformerEncoders:
    """Frozen CLIP and Synchformer; see `models.encoders.ClipEncoders`."""

    name = "clip_synchformer"
    clip_grid = VideoGrid(rate_hz=CLIP_RATE_HZ, size_px=CLIP_PX, fit="stretch", scaler="antialiased")
    sync_grid = VideoGrid(rate_hz=SYNC_RATE_HZ, size_px=FRAME_PX, fit="cover", scaler="antialiased")
    grids: tuple[VideoGrid, ...] = (clip_grid, sync_grid)

    def __init__(self, spec: ClipSpec, clip: "FrozenCLIP", synchformer: Synchformer) -> None:
        """Encoders for clips of `spec`, on the device of the networks."""
        self.spec = spec
        self._clip = clip
        self._synchformer = synchformer
        self._device = synchformer.vfeat_extractor.cls_token.device

    def encode(self, frames_by_grid: Mapping[VideoGrid, np.ndarray], caption: str) -> dict[str, np.ndarray]:
        """See `ClipEncoders.encode`; raises ValueError for frames of another number or size."""
        still, moving = frames_by_grid[self.clip_grid], frames_by_grid[self.sync_grid]
        for frames, grid in ((still, self.clip_grid), (moving, self.sync_grid)):
            _check(frames, grid, grid.num_frames(self.spec.duration_s))
        return {
            "clip_features": _half(self._embeddings(still[: self.spec.clip_len])),
            "sync_features": _half(self._sync_features(moving)),
            "text_features": self.encode_text(caption),
        }

    def encode_text(self, caption: str) -> np.ndarray:
        """See `ClipEncoders.encode_text`."""
        return _half(self._clip.text_states([caption])[0])

    @torch.no_grad()
    def _embeddings(self, frames: np.ndarray) -> Tensor:
        """uint8 [T, 384, 384, 3] -> [T, 1024]."""
        first, inverse = distinct([frame.tobytes() for frame in frames])
        chunks = torch.from_numpy(frames[first]).split(FRAMES_AT_ONCE)
        found = [self._clip.image_embeddings(rearrange(self._unit(chunk), "b h w c -> b c h w")) for chunk in chunks]
        return torch.cat(found)[inverse]

    @torch.no_grad()
    def _sync_features(self, frames: np.ndarray) -> Tensor:
        """uint8 [T, 224, 224, 3] -> [8 S, 768]."""
        _, names = distinct([frame.tobytes() for frame in frames])
        cut = torch.tensor(names).unfold(0, SEGMENT_FRAMES, SEGMENT_STRIDE)[: self.spec.sync_len // SYNC_SEGMENT_TOKENS]
        first, inverse = distinct([tuple(segment) for segment in cut.tolist()])
        moving = rearrange(torch.from_numpy(frames), "t h w c -> 1 t c h w")
        chunks = segment_frames(moving)[0, first].split(SEGMENTS_AT_ONCE)
        found = [self._synchformer((self._unit(chunk) - 0.5)[None] / 0.5)[0] for chunk in chunks]
        return rearrange(torch.cat(found)[inverse], "s f d -> (s f) d").float()

    def _unit(self, pixels: Tensor) -> Tensor:
        """uint8 -> float32 in [0, 1] on the networks' device."""
        return pixels.to(self._device).float() / 255


def distinct(items: list[bytes] | list[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Where each different item first occurs, and for every item which of these it is."""
    seen: dict[bytes | tuple[int, ...], int] = {}
    first: list[int] = []
    inverse: list[int] = []
    for index, item in enumerate(items):
        if item not in seen:
            seen[item] = len(first)
            first.append(index)
        inverse.append(seen[item])
    return first, inverse


def _check(frames: np.ndarray, grid: VideoGrid, number: int) -> None:
    expected = (number, grid.size_px, grid.size_px, 3)
    if frames.shape != expected or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, encoders 'clip_synchformer' want uint8 {expected}")


def _half(features: Tensor) -> np.ndarray:
    return features.cpu().numpy().astype(np.float16)
