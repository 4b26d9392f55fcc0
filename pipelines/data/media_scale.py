"""A decoded frame -> an RGB square: colour, size, crop and rotation; only for the frames that a grid keeps.

Part of the reader (`media.py`). A picture that shrinks at least twice is averaged over areas: two to three times faster
than swscale's bicubic, and as near to Pillow's antialiased bicubic. HDR pictures (PQ, HLG) are not tone-mapped: they
come out as coded, flatter than a screen would show them.
"""

from fractions import Fraction

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from pipelines.data.window import FrameGrid
from pipelines.errors import MediaError

EXACT = Interpolation.ACCURATE_RND | Interpolation.BITEXACT
SCALING = Interpolation.BICUBIC | EXACT
SHRINKING = Interpolation.AREA | EXACT
SHRINKS_FROM = 2


class FrameScaler:
    """Converts the frames of one stream to the squares of one grid."""

    def __init__(self, grid: FrameGrid, aspect: Fraction, max_pixels: int) -> None:
        """`aspect` is that of a pixel, width / height."""
        self._grid = grid
        self._aspect = float(aspect)
        self._max_pixels = max_pixels
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """uint8 [size_px, size_px, 3]."""
        if frame.is_corrupt:
            raise MediaError("truncated", "the picture is damaged inside the window")
        if frame.width * frame.height > self._max_pixels:
            raise MediaError("too_large", f"{frame.width}x{frame.height} is more than {self._max_pixels} pixels")
        size = self._grid.size_px
        width, height = (size, size) if self._grid.fit == "stretch" else self._covering(frame)
        if width * height > self._max_pixels:
            raise MediaError("too_large", f"{frame.width}x{frame.height} is too elongated for a square of {size}")
        square = self._scaled(frame, width, height)
        if width != height:
            # Python rounds halves to even, as torchvision's centre crop does.
            left, top = round((width - size) / 2), round((height - size) / 2)
            square = square[top : top + size, left : left + size]
        # The display matrix turns counter-clockwise by this angle, as rot90 does; a square turns in place.
        quarters = round(frame.rotation / 90) % 4
        return np.rot90(square, quarters) if quarters else square

    def _scaled(self, frame: VideoFrame, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3]."""
        if self._grid.scaler == "fast":
            shrinks = frame.width >= SHRINKS_FROM * width and frame.height >= SHRINKS_FROM * height
            method = SHRINKING if shrinks else SCALING
            return self._reformatter.reformat(
                frame, width, height, "rgb24", interpolation=method, threads=1
            ).to_ndarray()
        # Here, because most children never need Pillow.
        from PIL import Image

        whole = self._reformatter.reformat(frame, format="rgb24", interpolation=SCALING, threads=1).to_ndarray()
        return np.asarray(Image.fromarray(whole).resize((width, height), Image.Resampling.BICUBIC))

    def _covering(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height of the picture scaled so that its shorter side fits, rounded down as torchvision does."""
        shown_width = frame.width * self._aspect
        scale = self._grid.size_px / min(shown_width, frame.height)
        return (
            max(int(shown_width * scale + 1e-6), self._grid.size_px),
            max(int(frame.height * scale + 1e-6), self._grid.size_px),
        )
