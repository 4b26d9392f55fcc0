"""The two tracks of a window: which decoded frames become pictures, and where decoded sound is placed.

Part of the reader (`media.py`), which feeds them; runs in the decode child. Colour conversion, scaling, cropping and
rotation happen only to the frames that a grid keeps, straight from the decoder's own pixel format.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.frame import Frame
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from pipelines.data.window import AudioTimeline, FrameGrid, FrameSampler, WindowRequest
from pipelines.errors import MediaError

AUDIO_MARGIN_S = 0.05
"""Sound on both sides of the window, so that a resampler sees no edge where there is none."""
COMMON_RATES_HZ = frozenset(
    {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000, 176400, 192000}
)
FALLBACK_RATE_HZ = 48_000
"""Sound of any other rate is brought to this one by libswresample: odd ratios make huge resampling kernels."""
MAX_PLANES = 7
"""PyAV 18.1 counts the planes of a frame up to a null pointer, and runs past the end where there are 8 or more."""
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


@dataclass(frozen=True)
class WindowClock:
    """Turns presentation time stamps into seconds of the window."""

    zero: Fraction
    """The time stamp of t = 0, seconds."""

    def time_s(self, pts: int, time_base: Fraction) -> float:
        """Seconds of the window of a time stamp in units of `time_base`."""
        return float(pts * time_base - self.zero)


class PictureTrack:
    """The frames of the window, on every grid that is wanted."""

    def __init__(self, stream: VideoStream, clock: WindowClock, request: WindowRequest) -> None:
        self._clock = clock
        self._request = request
        self._time_base = stream.time_base or Fraction(1, 1000)
        tolerance_s = min(float(self._time_base) / 2, 0.0005) + 1e-6
        aspect = stream.codec_context.sample_aspect_ratio or Fraction(1)
        self._samplers = [FrameSampler(g, _Scaler(g, aspect, request.max_pixels), tolerance_s) for g in request.grids]
        self._frame_s = float(1 / stream.average_rate) if stream.average_rate else 0.04
        self._first_s: float | None = None
        self._last_s = -math.inf
        self._end_s = 0.0

    @property
    def frames(self) -> tuple[np.ndarray, ...]:
        """uint8 [num_frames, size_px, size_px, 3] of every grid, in the request's order."""
        return tuple(sampler.frames for sampler in self._samplers)

    @property
    def done(self) -> bool:
        """All grids are full, and enough was seen to say that the picture goes on to the window's end."""
        return all(s.done for s in self._samplers) and self._end_s >= self._request.duration_s

    @property
    def started_late(self) -> bool:
        """Whether the first thing decoded lies after the window's start."""
        return self._first_s is not None and self._first_s > 0

    def take(self, frames: Iterable[object]) -> None:
        """Take what one packet was decoded to."""
        for frame in frames:
            if not isinstance(frame, VideoFrame):
                continue
            time_s = self._time_of(frame)
            # Time stamps that go back are broken ones: what is shown stays.
            if time_s < self._last_s:
                continue
            if self._first_s is None:
                self._first_s = time_s
            for sampler in self._samplers:
                sampler.push(frame, time_s)
            self._last_s = time_s
            shown_s = float(frame.duration * self._time_base) if frame.duration else self._frame_s
            self._end_s = max(self._end_s, time_s + shown_s)

    def _time_of(self, frame: Frame) -> float:
        pts = frame.pts if frame.pts is not None else frame.dts
        if pts is None:
            return 0.0 if self._first_s is None else self._last_s + self._frame_s
        return self._clock.time_s(pts, frame.time_base or self._time_base)

    def finish(self) -> float:
        """Fill what is left with the last frame; seconds of the window that have a picture of their own."""
        if self._first_s is None:
            return 0.0
        for sampler in self._samplers:
            sampler.finish()
        return max(min(self._end_s, self._request.duration_s) - max(self._first_s, 0.0), 0.0)


class _Scaler:
    """Converts a decoded frame to an RGB square: colour, size, crop and rotation in one go."""

    def __init__(self, grid: FrameGrid, aspect: Fraction, max_pixels: int) -> None:
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
        scaled = self._scaled(frame, width, height)
        # Python rounds halves to even, as torchvision's centre crop does.
        left, top = round((width - size) / 2), round((height - size) / 2)
        square = scaled[top : top + size, left : left + size]
        # The display matrix turns counter-clockwise by this angle, as rot90 does; a square turns in place.
        return np.rot90(square, round(frame.rotation / 90) % 4)

    def _scaled(self, frame: VideoFrame, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3]."""
        if self._grid.scaler == "fast":
            return self._reformatter.reformat(
                frame, width, height, "rgb24", interpolation=SCALING, threads=1
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


class SoundTrack:
    """The sound of the window, mono, at the file's own rate."""

    def __init__(self, clock: WindowClock, request: WindowRequest) -> None:
        self._clock = clock
        self._request = request
        self._own_rate_hz: int | None = None
        self._resampler: AudioResampler | None = None
        self._timeline: AudioTimeline | None = None
        self._first_s: float | None = None
        self.rate_hz = 0
        self.margin = 0

    @property
    def samples(self) -> np.ndarray | None:
        """float32 [margin + window + margin] at `rate_hz`; None before any sound was decoded."""
        return None if self._timeline is None else self._timeline.samples

    @property
    def done(self) -> bool:
        """Whether the window and its margin have been passed."""
        return self._timeline is not None and self._timeline.done

    @property
    def started_late(self) -> bool:
        """Whether the first thing decoded lies after the window's start."""
        return self._first_s is not None and self._first_s > 0

    def take(self, frames: Iterable[object]) -> None:
        """Take what one packet was decoded to."""
        for frame in frames:
            if not isinstance(frame, AudioFrame) or frame.samples == 0:
                continue
            if self._timeline is None:
                self._timeline = self._start(frame)
            if frame.sample_rate != self._own_rate_hz:
                raise MediaError("unsupported_codec", "the sample rate changes inside the sound")
            for part in (frame,) if self._resampler is None else self._resampled(frame):
                self._place(part, self._timeline)

    def _start(self, frame: AudioFrame) -> AudioTimeline:
        self._own_rate_hz = self.rate_hz = frame.sample_rate
        if self.rate_hz not in COMMON_RATES_HZ:
            self.rate_hz = FALLBACK_RATE_HZ
        if self.rate_hz != frame.sample_rate or (frame.format.is_planar and frame.layout.nb_channels > MAX_PLANES):
            self._resampler = AudioResampler(format="flt", rate=self.rate_hz)
        wanted_hz = self._request.audio_rate_hz
        num_samples = math.ceil(self._request.audio_samples * self.rate_hz / wanted_hz)
        # A multiple of the reduced ratio, so that the margin is a whole number of samples at both rates.
        step = self.rate_hz // math.gcd(self.rate_hz, wanted_hz)
        self.margin = math.ceil(AUDIO_MARGIN_S * self.rate_hz / step) * step
        return AudioTimeline(self.rate_hz, num_samples, self.margin)

    def _resampled(self, frame: AudioFrame | None) -> list[AudioFrame]:
        if self._resampler is None:
            return []
        try:
            return self._resampler.resample(frame)
        except ValueError as error:
            raise MediaError("unsupported_codec", f"the sound changes its form: {error}") from error

    def _place(self, frame: AudioFrame, timeline: AudioTimeline) -> None:
        time_s = None
        if frame.pts is not None and frame.time_base is not None:
            time_s = self._clock.time_s(frame.pts, frame.time_base)
        if self._first_s is None:
            self._first_s = time_s
        timeline.place(_mono(frame), time_s)

    def finish(self) -> float:
        """Seconds of the window that hold decoded sound."""
        if self._timeline is None:
            return 0.0
        for part in self._resampled(None):
            self._place(part, self._timeline)
        if not np.isfinite(self._timeline.samples).all():
            raise MediaError("nonfinite", "the sound holds values that are not finite")
        return self._timeline.real_s


def _mono(frame: AudioFrame) -> np.ndarray:
    """float32 [samples]: the mean over the channels, full scale at 1."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    full_scale = {"u": 128.0, "i": 2.0 ** (8 * samples.dtype.itemsize - 1), "f": 1.0}[samples.dtype.kind]
    zero = 128.0 if samples.dtype.kind == "u" else 0.0
    mean = samples.mean(axis=0, dtype=np.float64)
    return ((mean - zero) / full_scale).astype(np.float32)
