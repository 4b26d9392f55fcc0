"""What turns the pictures and the caption of a clip into the generator's conditions, behind one protocol."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from models.grids import FRAME_PX, GRID_RATE_HZ, encode_caption, encode_frames
from models.spec import ClipSpec


@dataclass(frozen=True, kw_only=True)
class VideoGrid:
    """How an encoder wants to see a video: frames at `rate_hz` (frame i shows second i / rate), square, uint8 RGB."""

    rate_hz: float
    size_px: int
    fit: Literal["stretch", "cover"]
    """`stretch` changes the aspect ratio; `cover` scales the short side to `size_px` and crops the centre."""
    scaler: Literal["fast", "antialiased"] = "fast"
    """`fast` scales with the colour conversion in one go; `antialiased` is the bicubic filter of Pillow and torchvision
    on RGB, which the public encoders were trained behind."""

    def num_frames(self, duration_s: float) -> int:
        """Frames of a clip of so many seconds."""
        return round(self.rate_hz * duration_s)


class ClipEncoders(Protocol):
    """The frozen encoders of a preset; sees one clip a call."""

    name: str
    grids: tuple[VideoGrid, ...]

    def encode(self, frames_by_grid: Mapping[VideoGrid, np.ndarray], caption: str) -> dict[str, np.ndarray]:
        """Frames uint8 [T, H, W, 3] of every grid, and a caption that may be empty -> conditions, float16.

        Returns `clip_features` [Lc, Dc], `sync_features` [Ls, Ds] and `text_features` [Lt, Dt] of the spec.
        """
        ...

    def encode_text(self, caption: str) -> np.ndarray:
        """`text_features` alone, float16 [Lt, Dt]."""
        ...


class GridEncoder:
    """The demo world's encoders: colour grids, their differences, and hashed words. No weights."""

    name = "grids"
    grids: tuple[VideoGrid, ...] = (VideoGrid(rate_hz=GRID_RATE_HZ, size_px=FRAME_PX, fit="stretch"),)

    def __init__(self, spec: ClipSpec) -> None:
        """Encoders for clips of `spec`."""
        self.spec = spec

    def encode(self, frames_by_grid: Mapping[VideoGrid, np.ndarray], caption: str) -> dict[str, np.ndarray]:
        """See `ClipEncoders.encode`; raises ValueError for frames of another number or size."""
        frames = frames_by_grid[self.grids[0]]
        expected = (self.spec.frames_len, FRAME_PX, FRAME_PX, 3)
        if frames.shape != expected or frames.dtype != np.uint8:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, encoders 'grids' want uint8 {expected}")
        semantic, timing = encode_frames(frames)
        return {
            "clip_features": semantic.astype(np.float16),
            "sync_features": timing[: self.spec.sync_len].astype(np.float16),
            "text_features": self.encode_text(caption),
        }

    def encode_text(self, caption: str) -> np.ndarray:
        """See `ClipEncoders.encode_text`."""
        return encode_caption(caption, self.spec.text_len, self.spec.text_dim).astype(np.float16)


def _grids(spec: ClipSpec, device: torch.device | str, weights: Path | None) -> ClipEncoders:
    # Colour means cost microseconds on any processor: they stay where the frames are.
    return GridEncoder(spec)


def _clip_synchformer(spec: ClipSpec, device: torch.device | str, weights: Path | None) -> ClipEncoders:
    from models.pretrained import load_encoders

    return load_encoders(spec, weights, device)


_ENCODERS: Mapping[str, Callable[[ClipSpec, torch.device | str, Path | None], ClipEncoders]] = {
    "grids": _grids,
    "clip_synchformer": _clip_synchformer,
}


def build_encoders(
    name: str, spec: ClipSpec, device: torch.device | str = "cpu", weights: Path | None = None
) -> ClipEncoders:
    """The encoders called `name`, for clips of `spec`.

    Args:
        name: `grids` or `clip_synchformer`.
        spec: the clips.
        device: where the networks work.
        weights: folder of the networks' weights, for encoders that have some.

    Raises:
        ValueError: no such encoders, they do not give the spec's conditions, or their weights are not there.
    """
    check_encoders(name, spec)
    return _ENCODERS[name](spec, device, weights)


def check_encoders(name: str, spec: ClipSpec) -> None:
    """Raise ValueError if there are no such encoders, or if they do not give the spec's conditions."""
    if name not in _ENCODERS:
        raise ValueError(f"no encoders '{name}'; known are {sorted(_ENCODERS)}")
    if name != spec.condition_kind:
        raise ValueError(f"encoders '{name}' do not give the conditions of spec '{spec.name}'")
