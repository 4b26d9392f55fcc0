"""Windows of one media file as a trained model wants them: read and encoded by the very functions of preprocess."""

from dataclasses import dataclass
from types import TracebackType

import numpy as np

from models.encoders import ClipEncoders, VideoGrid
from models.spec import ClipSpec
from pipelines.data.clip_worker import frame_grid
from pipelines.data.decoding import DecodeLimits, Decoder
from pipelines.data.frames import decode_frames, encode_jpeg
from pipelines.data.window import DecodedWindow, MediaInfo, WindowRequest
from pipelines.preferences.candidates import ConditionRow

MAX_PIXELS = 4096 * 2304
ALL_MAY_MISS = 1.0
"""A file shorter than a window is continued by its last frame."""


@dataclass(frozen=True, kw_only=True)
class FileWindow:
    """One window of a file: what SF-CAVP sees of it and what the generator is conditioned on."""

    frames: np.ndarray | None
    """uint8 [frames_len, frames_px, frames_px, 3] at 16 fps, after the same JPEG as stored ones; None if not wanted."""
    conditions: ConditionRow


class FileClips:
    """Reads windows of files through a decode child; use as a context manager."""

    def __init__(self, spec: ClipSpec, *, timeout_s: float = 60.0) -> None:
        """`timeout_s` is for the decoding of one window."""
        self._spec = spec
        self._frames = VideoGrid(rate_hz=spec.frames_rate_hz, size_px=spec.frames_px, fit="stretch")
        self._decoder = Decoder(DecodeLimits(timeout_s=timeout_s))

    def __enter__(self) -> "FileClips":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._decoder.close()

    def probe(self, path: str) -> MediaInfo:
        """What the container says; raises MediaError where it cannot be opened."""
        return self._decoder.probe(path, MAX_PIXELS)

    def frames(self, path: str, start_s: float) -> np.ndarray:
        """What SF-CAVP sees of the window from `start_s`: uint8 [frames_len, frames_px, frames_px, 3].

        Raises MediaError where the picture cannot be used.
        """
        return _as_stored(self._decode(path, start_s, (self._frames,), with_sound=False).frames[0])

    def picture(
        self, path: str, start_s: float, encoders: ClipEncoders, caption: str, *, with_frames: bool = True
    ) -> FileWindow:
        """The window from `start_s`, whether or not the file has sound; raises MediaError as `frames`.

        Without `with_frames`, what SF-CAVP sees is neither decoded nor kept.
        """
        wanted = (self._frames,) if with_frames else ()
        grids = tuple(dict.fromkeys((*wanted, *encoders.grids)))
        frames = dict(zip(grids, self._decode(path, start_s, grids, with_sound=False).frames, strict=True))
        conditions = ConditionRow(**encoders.encode(frames, caption))
        return FileWindow(frames=_as_stored(frames[self._frames]) if with_frames else None, conditions=conditions)

    def sound(self, path: str, start_s: float) -> DecodedWindow:
        """The sound of the window from `start_s`, whether or not the file has a picture."""
        return self._decode(path, start_s, (), with_sound=True)

    def _decode(self, path: str, start_s: float, grids: tuple[VideoGrid, ...], *, with_sound: bool) -> DecodedWindow:
        return self._decoder.decode(
            path,
            WindowRequest(
                start_s=start_s,
                duration_s=self._spec.duration_s,
                grids=tuple(frame_grid(grid, self._spec) for grid in grids),
                audio_rate_hz=self._spec.sample_rate_hz,
                audio_samples=self._spec.num_samples if with_sound else 0,
                max_pixels=MAX_PIXELS,
                max_missing=ALL_MAY_MISS,
            ),
        )


def _as_stored(frames: np.ndarray) -> np.ndarray:
    """Frames through the JPEG of stored rows, whose artefacts the reward was trained with."""
    return decode_frames([encode_jpeg(frame) for frame in frames])
