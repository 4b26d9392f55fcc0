"""Small real media files for tests: flash and beep, ramps, tones, in any container, rate and layout."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.own_scheduling import own_scheduling

TIME_BASE = Fraction(1, 12_800)


def grey_frames(levels: Iterable[float], height: int = 32, width: int = 48) -> list[np.ndarray]:
    """One grey picture a level, uint8 RGB."""
    return [np.full((height, width, 3), level, np.uint8) for level in levels]


def tone(duration_s: float, rate_hz: int, frequency_hz: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    """float32 [1, S] sine."""
    times = np.arange(round(duration_s * rate_hz)) / rate_hz
    return (amplitude * np.sin(2 * np.pi * frequency_hz * times)).astype(np.float32)[None]


def beep(duration_s: float, rate_hz: int, at_s: float) -> np.ndarray:
    """float32 [1, S]: silence with 100 ms of 1 kHz."""
    wave = tone(duration_s, rate_hz, 1000.0, 0.8)
    times = np.arange(wave.shape[1]) / rate_hz
    return wave * ((times >= at_s) & (times < at_s + 0.1))


@own_scheduling()
def write_clip(
    path: Path,
    frames: Sequence[np.ndarray] | None,
    wave: np.ndarray | None,
    *,
    frame_times_s: Sequence[float] | None = None,
    frame_rate: int = 25,
    rate_hz: int = 48_000,
    layout: str = "mono",
    video_codec: str = "libx264",
    audio_codec: str = "aac",
    pixel_format: str = "yuv420p",
    b_frames: int = 0,
    rotation: float | None = None,
    offset_s: float = 0.0,
    faststart: bool = False,
    group: int = 12,
) -> Path:
    """Write frames (uint8 RGB) and a wave (float32 [channels, S]) into one file; `offset_s` shifts both tracks."""
    options = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as container:
        video = audio = None
        if frames is not None:
            video = container.add_stream(video_codec, rate=frame_rate)
            video.height, video.width = frames[0].shape[:2]
            video.pix_fmt = pixel_format
            video.codec_context.time_base = TIME_BASE
            video.codec_context.gop_size = group
            if video_codec == "libx264":
                video.options = {"preset": "ultrafast", "crf": "12", "bf": str(b_frames)}
            if rotation is not None:
                video.set_display_rotation(rotation)
        if wave is not None:
            audio = container.add_stream(audio_codec, rate=rate_hz, layout=layout)
        if video is not None:
            times = frame_times_s or [i / frame_rate for i in range(len(frames or ()))]
            for picture, time_s in zip(frames or (), times, strict=True):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = round((time_s + offset_s) / TIME_BASE), TIME_BASE
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if audio is not None and wave is not None:
            packed = np.ascontiguousarray(wave.T, np.float32).reshape(1, -1)
            block = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
            block.sample_rate = rate_hz
            block.pts, block.time_base = round(offset_s * rate_hz), Fraction(1, rate_hz)
            container.mux(audio.encode(block))
            container.mux(audio.encode(None))
    return path


def simple_clip(path: Path, duration_s: float = 2.5, *, rate_hz: int = 16_000, frame_rate: int = 16) -> Path:
    """A clip that becomes a row: a moving square and a tone, different for every file name."""
    rng = np.random.default_rng(sum(path.name.encode("utf-8", "surrogateescape")))
    count = round(duration_s * frame_rate)
    frames = np.full((count, 64, 64, 3), 40, np.uint8)
    for i in range(count):
        frames[i, 20:36, i % 48 : i % 48 + 16] = rng.integers(90, 255, 3)
    wave = tone(duration_s, rate_hz, rng.uniform(300, 3000), 0.4)
    return write_clip(path, list(frames), wave, rate_hz=rate_hz, frame_rate=frame_rate)
