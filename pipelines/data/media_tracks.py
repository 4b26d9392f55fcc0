"""The two tracks of a window: which packets are decoded, which frames become pictures, and where sound is placed.

Part of the reader (`media.py`), which feeds them; runs in the decode child. Decoding is most of what a clip costs, so
what cannot matter is not decoded: frames that no grid shows and nothing builds on, and sound long before the window.
"""

import math
from collections.abc import Iterable
from fractions import Fraction
from heapq import heappop, heappush

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.frame import Frame
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipelines.data.media_mix import MonoMixer
from pipelines.data.media_plan import LOOKAHEAD, FramePlan, Planned
from pipelines.data.media_scale import FrameScaler
from pipelines.data.window import AudioTimeline, FrameSampler, WindowRequest
from pipelines.errors import MediaError

AUDIO_MARGIN_S = 0.05
"""Sound on both sides of the window, so that a resampler sees no edge where there is none."""
AUDIO_LEAD_S = 0.5
"""Sound is decoded from this long before the window: decoders take up to some tenths of a second to settle."""
COMMON_RATES_HZ = frozenset(
    {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000, 176400, 192000}
)
FALLBACK_RATE_HZ = 48_000
"""Sound of any other rate is brought to this one by libswresample: odd ratios make huge resampling kernels."""
RATES_HZ = range(4000, 768_001)
"""No sound has another rate. One of 8 Hz would grow to 6000 times its size."""
MAX_PLANES = 7
"""PyAV 18.1 counts the planes of a frame up to a null pointer, and runs past the end where there are 8 or more."""
SKIPPING_CODECS = frozenset({"h264", "hevc", "mpeg4"})
"""Their decoders pass over a frame that nothing is built on when told to, and each packet holds one shown frame."""


class Skipped(Exception):
    """A frame that was counted on did not come out: the file has to be read again with every frame decoded."""


class WindowClock:
    """Turns presentation time stamps into seconds of the window."""

    def __init__(self, zero: Fraction) -> None:
        """`zero` is the time stamp of t = 0, seconds."""
        self.zero = zero

    def time_s(self, pts: int, time_base: Fraction) -> float:
        """Seconds of the window of a time stamp in units of `time_base`."""
        # Whole numbers and one division: exact as fractions are, and ten times faster.
        zero, below = self.zero.numerator, self.zero.denominator
        return (pts * time_base.numerator * below - zero * time_base.denominator) / (time_base.denominator * below)


class PictureTrack:
    """The frames of the window, on every grid that is wanted."""

    def __init__(
        self, stream: VideoStream, clock: WindowClock, request: WindowRequest, *, skip: bool, timed: bool = True
    ) -> None:
        """With `skip`, frames that are not shown are not decoded where the codec allows; else all are.

        Not `timed` is a container that only counts pictures (AVI): each one that comes out is given the earliest
        decoding time that is left, since FFmpeg's guesses of presentation times are wrong by the reordering.
        """
        self._stream = stream
        self._clock = clock
        self._request = request
        self._time_base = stream.time_base or Fraction(1, 1000)
        tolerance_s = min(float(self._time_base) / 2, 0.0005) + 1e-6
        aspect = stream.codec_context.sample_aspect_ratio or Fraction(1)
        self._samplers = [
            FrameSampler(grid, FrameScaler(grid, aspect, request.max_pixels), tolerance_s) for grid in request.grids
        ]
        self._frame_s = float(1 / stream.average_rate) if stream.average_rate else 0.04
        self._first_s: float | None = None
        self._last_s = -math.inf
        self._end_s = 0.0
        self._num_late = 0
        self._held: list[Planned[Packet]] = []
        self._expected: set[int] = set()
        self._spoiled: str | None = None
        self._ended = False
        # Without reordering, every frame is one that others build on.
        self._times_left: list[int] | None = None if timed else []
        able = timed and stream.codec_context.name in SKIPPING_CODECS and stream.codec_context.has_b_frames
        self._plan: FramePlan[Packet] | None = FramePlan(request.grids, tolerance_s) if skip and able else None
        self._skipping = False
        self.broken: str | None = None

    @property
    def frames(self) -> tuple[np.ndarray, ...]:
        """uint8 [num_frames, size_px, size_px, 3] of every grid, in the request's order."""
        return tuple(sampler.frames for sampler in self._samplers)

    @property
    def done(self) -> bool:
        """All grids are full, and enough was seen to say that the picture goes on to the window's end."""
        return self._ended or (self._end_s >= self._request.duration_s and all(s.done for s in self._samplers))

    @property
    def started_late(self) -> bool:
        """Whether the first thing decoded lies after the window's start."""
        return self._first_s is not None and self._first_s > 0

    def read(self, packet: Packet) -> None:
        """Decode a packet, now or when enough is known; the empty one at the end of a file has the rest decoded.

        Raises:
            MediaError: truncated, too_large, unsupported_codec.
            Skipped: frames must not be skipped in this file.
        """
        if self._plan is None:
            self._decode(packet)
        elif not packet.size:
            self._end(self._plan)
        else:
            for planned in self._plan.push(packet, self._packet_time_s(packet)):
                self._follow(planned, self._plan)
            if self._end_s >= self._request.duration_s and self._is_past(packet, self._plan.last_s):
                self._end(self._plan)

    def _packet_time_s(self, packet: Packet) -> float | None:
        """When the packet's frame is shown; None for one that is not to be seen."""
        if packet.is_discard:
            return None
        if packet.pts is None:
            raise Skipped("a packet has no time stamp")
        time_s = self._clock.time_s(packet.pts, self._time_base)
        if not packet.is_corrupt:
            shown_s = float(packet.duration * self._time_base) if packet.duration else self._frame_s
            self._end_s = max(self._end_s, time_s + shown_s)
        self._num_late = self._num_late + 1 if time_s > self._request.duration_s else 0
        return time_s

    def _is_past(self, packet: Packet, last_s: float) -> bool:
        """Whether no frame that is still to come can be shown."""
        decoded_s = -math.inf if packet.dts is None else self._clock.time_s(packet.dts, self._time_base)
        return decoded_s > last_s or self._num_late > LOOKAHEAD

    def _follow(self, planned: Planned[Packet], plan: FramePlan[Packet]) -> None:
        if not planned.shown and planned.time_s is not None and planned.time_s > plan.last_s:
            # After the window; decoded only if a frame inside builds on it.
            self._held.append(planned)
            return
        for one in (*self._held, planned):
            skip = not one.shown and not one.packet.is_corrupt
            if skip != self._skipping:
                self._stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
                self._skipping = skip
            if one.shown and one.packet.pts is not None:
                self._expected.add(one.packet.pts)
            self._decode(one.packet)
        self._held.clear()

    def _end(self, plan: FramePlan[Packet]) -> None:
        for planned in plan.rest():
            self._follow(planned, plan)
        self._stream.codec_context.skip_frame = "DEFAULT"
        self._decode(None)
        self._ended = True
        if self._expected:
            raise Skipped(f"{len(self._expected)} frames did not come out")

    def _decode(self, packet: Packet | None) -> None:
        if self._times_left is not None and packet is not None and packet.size and packet.dts is not None:
            heappush(self._times_left, packet.dts)
        try:
            frames = self._stream.codec_context.decode(None) if packet is None else packet.decode()
        except MemoryError as error:
            raise MediaError("too_large", f"decoding needs more memory than is allowed: {error}") from error
        except EOFError:
            return
        except av.FFmpegError as error:
            self._damaged(None if packet is None else packet.pts, error)
            return
        if packet is not None and packet.is_keyframe:
            self._spoiled = None if self._times_left is None else self._spoiled
        self._take(frames)

    def _damaged(self, pts: int | None, error: av.FFmpegError) -> None:
        time_s = None if pts is None else self._clock.time_s(pts, self._time_base)
        where = "at an unknown time" if time_s is None else f"at {time_s:.3f} s of the window"
        self.broken = f"video cannot be decoded {where}: {error}"
        # Frames up to the next key frame build on this one.
        self._spoiled = self.broken
        if time_s is None or 0 <= time_s < self._request.duration_s:
            raise MediaError("truncated", self.broken)

    def _take(self, frames: Iterable[object]) -> None:
        for frame in frames:
            if not isinstance(frame, VideoFrame):
                continue
            time_s = self._time_of(frame)
            if self._spoiled is not None and 0 <= time_s < self._request.duration_s:
                raise MediaError("truncated", f"the picture builds on a damaged one; {self._spoiled}")
            # Time stamps that go back are broken ones: what is shown stays.
            if time_s < self._last_s:
                continue
            if frame.pts is not None:
                self._expected.discard(frame.pts)
            if self._first_s is None:
                self._first_s = time_s
            for sampler in self._samplers:
                sampler.push(frame, time_s)
            self._last_s = time_s
            shown_s = float(frame.duration * self._time_base) if frame.duration else self._frame_s
            self._end_s = max(self._end_s, time_s + shown_s)

    def _time_of(self, frame: Frame) -> float:
        pts = frame.pts if frame.pts is not None else frame.dts
        if self._times_left:
            pts = heappop(self._times_left)
        if pts is None:
            return 0.0 if self._first_s is None else self._last_s + self._frame_s
        return self._clock.time_s(pts, frame.time_base or self._time_base)

    def finish(self) -> float:
        """Fill what is left with the last frame; seconds of the window that have a picture of their own.

        Raises:
            MediaError, Skipped: as `read`.
        """
        if self._plan is not None and not self._ended:
            self._end(self._plan)
        if self._first_s is None:
            return 0.0
        for sampler in self._samplers:
            sampler.finish()
        return max(min(self._end_s, self._request.duration_s) - max(self._first_s, 0.0), 0.0)


class SoundTrack:
    """The sound of the window, mono, at the file's own rate."""

    def __init__(self, stream: AudioStream, clock: WindowClock, request: WindowRequest) -> None:
        self._stream = stream
        self._clock = clock
        self._request = request
        self._mono = MonoMixer()
        self._own_rate_hz: int | None = None
        self._resampler: AudioResampler | None = None
        self._timeline: AudioTimeline | None = None
        self._first_s: float | None = None
        self.rate_hz = 0
        self.margin = 0
        self.broken: str | None = None

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

    def read(self, packet: Packet) -> None:
        """Decode a packet; what cannot be decoded leaves a gap, which counts as missing.

        Raises:
            MediaError: too_large, unsupported_codec.
        """
        if self._is_early(packet):
            return
        try:
            frames = packet.decode()
        except MemoryError as error:
            raise MediaError("too_large", f"decoding needs more memory than is allowed: {error}") from error
        except EOFError:
            return
        except av.FFmpegError as error:
            self.broken = f"audio cannot be decoded: {error}"
            return
        self._take(frames)

    def _is_early(self, packet: Packet) -> bool:
        if packet.pts is None or not packet.duration or not packet.size or packet.time_base is None:
            return False
        return self._clock.time_s(packet.pts + packet.duration, packet.time_base) < -AUDIO_LEAD_S

    def _take(self, frames: Iterable[object]) -> None:
        for frame in frames:
            if not isinstance(frame, AudioFrame) or frame.samples == 0:
                continue
            if self._timeline is None:
                self._timeline = self._start(frame)
            if self._resampler is None and _has_too_many_planes(frame):
                # Damaged AAC may decode to dozens of channels for a moment.
                self.broken = f"the sound changes to {frame.layout.nb_channels} channels"
                continue
            if frame.sample_rate != self._own_rate_hz:
                raise MediaError("unsupported_codec", "the sample rate changes inside the sound")
            for part in (frame,) if self._resampler is None else self._resampled(frame):
                self._place(part, self._timeline)

    def _start(self, frame: AudioFrame) -> AudioTimeline:
        self._own_rate_hz = self.rate_hz = frame.sample_rate
        if self.rate_hz not in RATES_HZ:
            raise MediaError("unsupported_codec", f"sound of {self.rate_hz} Hz")
        if self.rate_hz not in COMMON_RATES_HZ:
            self.rate_hz = FALLBACK_RATE_HZ
        if self.rate_hz != frame.sample_rate or _has_too_many_planes(frame):
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
        timeline.place(self._mono(frame), time_s)

    def finish(self) -> float:
        """Seconds of the window that hold decoded sound.

        Raises:
            MediaError: nonfinite, unsupported_codec.
        """
        if self._timeline is None:
            return 0.0
        for part in self._resampled(None):
            self._place(part, self._timeline)
        if not np.isfinite(self._timeline.samples).all():
            raise MediaError("nonfinite", "the sound holds values that are not finite")
        return self._timeline.real_s


def _has_too_many_planes(frame: AudioFrame) -> bool:
    return frame.format.is_planar and frame.layout.nb_channels > MAX_PLANES
