"""What is asked of a media file and what comes back: one window of time, picture and sound on one clock.

Only numpy here and nothing of the decoder, because these types cross the pipe to the decode child. The two samplers
hold the rules that alignment depends on: which frame is shown at a time, and where in the window a block of sound goes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np

Frame = TypeVar("Frame")

AUDIO_SLACK_S = 0.005
"""Sound whose time stamp is off by less is taken as continuous: containers round stamps to a millisecond."""


@dataclass(frozen=True, kw_only=True)
class FrameGrid:
    """Frames wanted at the times k / rate_hz, k = 0 .. num_frames - 1, as squares of size_px."""

    rate_hz: float
    size_px: int
    fit: Literal["stretch", "cover"]
    """`stretch`: the whole picture, aspect not kept. `cover`: shorter side to size_px, centre crop."""
    num_frames: int
    scaler: Literal["fast", "antialiased"] = "fast"
    """`fast`: swscale's bicubic, with the colour conversion. `antialiased`: Pillow's bicubic on RGB of full size."""


@dataclass(frozen=True, kw_only=True)
class WindowRequest:
    """One window of a file: t = 0 is `start_s` after the file's own first time stamp."""

    start_s: float
    duration_s: float
    grids: tuple[FrameGrid, ...]
    """Empty: the picture is not wanted and may be absent."""
    audio_rate_hz: int
    """Rate the sound will be resampled to by the caller."""
    audio_samples: int
    """Samples at that rate; 0: the sound is not wanted and may be absent."""
    max_pixels: int
    max_missing: float = 0.05
    """Share of the window that may be padded."""
    max_file_s: float | None = None
    """Length of a file from which it is `too_long`; None: any."""


@dataclass(frozen=True)
class SourceFormat:
    """What the reader can tell of the file's own streams; None where it cannot, or was not asked for that stream."""

    width: int | None = None
    height: int | None = None
    fps: float | None = None
    rate_hz: int | None = None
    channels: int | None = None


@dataclass(frozen=True, kw_only=True)
class DecodedWindow:
    """The answer: frames of each grid and the sound at a rate of the file's own."""

    frames: tuple[np.ndarray, ...]
    """uint8 [num_frames, size_px, size_px, 3] RGB, in the order of the request's grids."""
    audio: np.ndarray | None
    """float32 mono (mean of the channels) of the window with `audio_margin` real samples on both sides."""
    audio_rate_hz: int
    audio_margin: int
    """A whole number of samples at the wanted rate too."""
    valid_s: float
    source: SourceFormat = SourceFormat()


@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What the container says of itself; nothing is decoded for it."""

    duration_s: float | None
    """From the first time stamp to where the shorter of picture and sound ends; None when the file does not say."""
    sound_s: float | None
    """The same of the sound alone; None also where there is none."""
    has_video: bool
    has_audio: bool
    width: int
    height: int


class FrameSampler(Generic[Frame]):
    """Picks, for every time k / rate_hz, the frame that is shown then, and converts only those.

    The frame shown at a time is the latest whose presentation time is not after it; before the first, the first.
    """

    def __init__(self, grid: FrameGrid, convert: Callable[[Frame], np.ndarray], tolerance_s: float) -> None:
        """`tolerance_s` forgives rounded time stamps; `convert` gives uint8 [size_px, size_px, 3]."""
        self.frames = np.zeros((grid.num_frames, grid.size_px, grid.size_px, 3), np.uint8)
        self._rate_hz = grid.rate_hz
        self._convert = convert
        self._tolerance_s = tolerance_s
        self._next = 0
        self._shown: Frame | None = None

    @property
    def done(self) -> bool:
        """Whether every wanted frame is there."""
        return self._next == len(self.frames)

    def push(self, frame: Frame, time_s: float) -> None:
        """Take the next frame in presentation order, shown from `time_s` on (relative to the window)."""
        self._emit_until(time_s - self._tolerance_s)
        self._shown = frame

    def finish(self) -> None:
        """No more frames: the last one stays."""
        self._emit_until(np.inf)

    def _emit_until(self, time_s: float) -> None:
        converted: np.ndarray | None = None
        while self._shown is not None and not self.done and self._next / self._rate_hz < time_s:
            if converted is None:
                converted = self._convert(self._shown)
            self.frames[self._next] = converted
            self._next += 1


class AudioTimeline:
    """Mono samples placed by their time stamps in [-margin, num_samples + margin); what is not there is silence."""

    def __init__(self, rate_hz: int, num_samples: int, margin: int) -> None:
        self.samples = np.zeros(num_samples + 2 * margin, np.float32)
        self._covered = np.zeros(num_samples + 2 * margin, bool)
        self._rate_hz = rate_hz
        self._num_samples = num_samples
        self._margin = margin
        self._cursor: int | None = None

    @property
    def done(self) -> bool:
        """Whether the window and its margin have been passed."""
        return self._cursor is not None and self._cursor >= self._num_samples + self._margin

    @property
    def real_s(self) -> float:
        """Seconds of the window, margins not counted, that hold decoded sound."""
        return float(self._covered[self._margin : self._margin + self._num_samples].sum()) / self._rate_hz

    def place(self, mono: np.ndarray, time_s: float | None) -> None:
        """Add a block that starts at `time_s` of the window; None continues the last block."""
        position = self._position(time_s)
        self._cursor = position + len(mono)
        first = max(position, -self._margin)
        last = min(position + len(mono), self._num_samples + self._margin)
        if first < last:
            target = slice(first + self._margin, last + self._margin)
            self.samples[target] = mono[first - position : last - position]
            self._covered[target] = True

    def _position(self, time_s: float | None) -> int:
        if time_s is None:
            return self._cursor or 0
        position = round(time_s * self._rate_hz)
        if self._cursor is not None and abs(position - self._cursor) <= AUDIO_SLACK_S * self._rate_hz:
            return self._cursor
        return position


def request_from_dict(fields: dict[str, Any]) -> WindowRequest:
    """The inverse of `dataclasses.asdict` after a trip through JSON."""
    return WindowRequest(**{**fields, "grids": tuple(FrameGrid(**grid) for grid in fields["grids"])})
