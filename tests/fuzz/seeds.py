"""The clips that the fuzzer mutates: every codec in every container that the PyAV wheel writes and we read, 2.6 s long.

Each says what preprocess makes of it untouched, so that a run whose mutants are all refused for a wrong reason cannot
look like a good one. The bytes are the same in every run of one PyAV: one thread, nothing random in the containers.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer

from tests.own_scheduling import own_scheduling

SIDE_PX = 64
FRAME_RATE_HZ = 16
DURATION_S = 2.6
ROW = "row"
TIME_BASE = Fraction(1, 16_000)
QUIET = {
    "libx264": {"preset": "ultrafast", "bf": "2", "b_strategy": "0", "crf": "32", "g": "16"},
    "libx265": {"preset": "ultrafast", "crf": "36", "x265-params": "log-level=none:pools=none:frame-threads=1"},
    "libsvtav1": {"preset": "12", "crf": "55", "svtav1-params": "lp=1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "b": "60k", "auto-alt-ref": "0"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "60k"},
    "mpeg4": {"bf": "1", "g": "12", "b": "80k"},
}


@dataclass(frozen=True, kw_only=True)
class Seed:
    """How one clip is made, and what becomes of it."""

    name: str
    """With the suffix that gives the container."""
    video: str | None = None
    audio: str | None = None
    expected: str = ROW
    """`row`, or the reason of the reject."""
    format: str | None = None
    """Muxer, where the suffix does not say it."""
    pixels: str = "yuv420p"
    size_px: tuple[int, int] = (SIDE_PX, SIDE_PX)
    rate_hz: int = 48_000
    layout: str = "mono"
    duration_s: float = DURATION_S
    offset_s: float = 0.0
    rotation: int | None = None
    uneven: bool = False
    """Frames at uneven times."""
    muxer: Mapping[str, str] = field(default_factory=dict)


FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
SEEDS = (
    Seed(name="h264_aac.mp4", video="libx264", audio="aac"),
    Seed(name="h264_faststart.mp4", video="libx264", audio="aac", rate_hz=44_100, muxer={"movflags": "faststart"}),
    Seed(name="h264_fragments.mp4", video="libx264", audio="aac", muxer=FRAGMENTED),
    Seed(name="h264_late.mp4", video="libx264", audio="aac", offset_s=0.7),
    Seed(name="h264_uneven.mp4", video="libx264", audio="libmp3lame", uneven=True),
    Seed(name="h264_long.mp4", video="libx264", audio="aac", rate_hz=16_000, duration_s=6.0),
    Seed(name="h264_mute.mp4", video="libx264", expected="no_audio"),
    Seed(name="hevc_aac.mp4", video="libx265", audio="aac", layout="5.1"),
    Seed(name="hevc_fragments.mp4", video="libx265", audio="libopus", muxer=FRAGMENTED),
    Seed(name="av1_opus.mp4", video="libsvtav1", audio="libopus"),
    Seed(name="vp9_flac.mp4", video="libvpx-vp9", audio="flac", rate_hz=32_000),
    Seed(name="mpeg4_mp3.mp4", video="mpeg4", audio="libmp3lame"),
    Seed(name="h264_turned.mov", video="libx264", audio="pcm_s16le", rate_hz=16_000, rotation=90),
    Seed(name="h264_ten_bit.mov", video="libx264", audio="pcm_s24le", rate_hz=16_000, pixels="yuv420p10le"),
    Seed(name="hevc_ten_bit.mov", video="libx265", audio="aac", pixels="yuv420p10le"),
    Seed(name="h264_vorbis.mkv", video="libx264", audio="vorbis", layout="stereo"),
    Seed(name="hevc_flac.mkv", video="libx265", audio="flac", layout="7.1", rate_hz=16_000),
    Seed(name="mpeg4_aac.mkv", video="mpeg4", audio="aac", rate_hz=96_000),
    Seed(name="av1_pcm.mkv", video="libsvtav1", audio="pcm_f32le", rate_hz=8_000),
    Seed(name="vp8_vorbis.webm", video="libvpx", audio="vorbis", layout="stereo"),
    Seed(name="vp8_alpha.webm", video="libvpx", audio="libopus", pixels="yuva420p"),
    Seed(name="vp9_opus.webm", video="libvpx-vp9", audio="libopus"),
    Seed(name="vp9_odd.webm", video="libvpx-vp9", audio="libopus", size_px=(35, 21)),
    Seed(name="vp9_long.webm", video="libvpx-vp9", audio="libopus", duration_s=6.0),
    Seed(name="av1_opus.webm", video="libsvtav1", audio="libopus"),
    Seed(name="mpeg4_mp3.avi", video="mpeg4", audio="libmp3lame", rate_hz=44_100),
    Seed(name="h264_pcm.avi", video="libx264", audio="pcm_u8", rate_hz=11_025),
    Seed(
        name="mjpeg_pcm.avi",
        video="mjpeg",
        audio="pcm_s16le",
        rate_hz=8_000,
        pixels="yuvj420p",
        expected="unsupported_codec",
    ),
    Seed(name="vp8_vorbis.ogg", video="libvpx", audio="vorbis", layout="stereo"),
    Seed(name="opus.ogg", audio="libopus", expected="no_video"),
    Seed(name="mp3.mp3", audio="libmp3lame", expected="no_video"),
    Seed(name="flac.flac", audio="flac", rate_hz=16_000, expected="no_video"),
    Seed(name="pcm.wav", audio="pcm_s16le", rate_hz=8_000, expected="no_video"),
    Seed(name="h264_aac.ts", video="libx264", audio="aac", format="mpegts", expected="not_media"),
)


def write_seeds(folder: Path, seeds: Sequence[Seed] = SEEDS) -> dict[str, bytes]:
    """Write every seed into a folder; their bytes by name."""
    for seed in seeds:
        write_seed(folder / seed.name, seed)
    return {seed.name: (folder / seed.name).read_bytes() for seed in seeds}


@own_scheduling()
def write_seed(path: Path, seed: Seed) -> Path:
    """Write one clip: a square that moves over noise, and a tone with a tremolo."""
    os.environ.setdefault("SVT_LOG", "1")  # Errors alone: the AV1 encoder greets on stderr otherwise.
    options = {"fflags": "+bitexact", **seed.muxer}
    with av.open(str(path), "w", format=seed.format, options=options) as out:
        video = out.add_stream(seed.video, rate=FRAME_RATE_HZ) if seed.video else None
        audio = out.add_stream(seed.audio, rate=seed.rate_hz, layout=seed.layout) if seed.audio else None
        if video is not None:
            video.width, video.height = seed.size_px
            video.pix_fmt = seed.pixels
            video.codec_context.thread_count = 1
            video.codec_context.time_base = TIME_BASE
            video.codec_context.options = {"flags": "+bitexact", **QUIET.get(seed.video or "", {})}
            if seed.rotation is not None:
                video.set_display_rotation(seed.rotation)
        if audio is not None:
            audio.codec_context.options = {"flags": "+bitexact", "strict": "experimental"}
        _write_streams(out, video, audio, seed)
    return path


def _write_streams(out: OutputContainer, video: object, audio: object, seed: Seed) -> None:
    packets = []
    if isinstance(video, av.VideoStream):
        for frame in _pictures(seed):
            packets += video.encode(frame)
        packets += video.encode(None)
    if isinstance(audio, av.AudioStream):
        packets += audio.encode(_sound(seed))
        packets += audio.encode(None)
    for packet in sorted(packets, key=lambda p: float((p.dts or 0) * p.time_base)):
        out.mux(packet)


def _pictures(seed: Seed) -> list[av.VideoFrame]:
    rng = np.random.default_rng(len(seed.name))
    width, height = seed.size_px
    ground = np.kron(rng.integers(40, 120, (height // 8 + 1, width // 8 + 1, 3)), np.ones((8, 8, 1)))
    frames = []
    for i in range(round(seed.duration_s * FRAME_RATE_HZ)):
        pixels = ground[:height, :width].astype(np.uint8)
        pixels[height // 4 : height // 2, i * 2 % width : i * 2 % width + width // 4] = rng.integers(150, 250, 3)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        time_s = i / FRAME_RATE_HZ + (0.02 * (i % 3) if seed.uneven else 0.0) + seed.offset_s
        frame.pts, frame.time_base = round(time_s / TIME_BASE), TIME_BASE
        frames.append(frame)
    return frames


def _sound(seed: Seed) -> av.AudioFrame:
    times = np.arange(round(seed.duration_s * seed.rate_hz)) / seed.rate_hz
    mono = 0.4 * np.sin(2 * np.pi * (300 + 20 * len(seed.name)) * times) * (1 + 0.5 * np.sin(2 * np.pi * 3 * times))
    packed = np.repeat(mono.astype(np.float32)[:, None], av.AudioLayout(seed.layout).nb_channels, axis=1)
    frame = av.AudioFrame.from_ndarray(packed.reshape(1, -1), format="flt", layout=seed.layout)
    frame.sample_rate = seed.rate_hz
    frame.pts, frame.time_base = round(seed.offset_s * seed.rate_hz), Fraction(1, seed.rate_hz)
    return frame
