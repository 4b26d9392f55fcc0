"""The writer of media that is in memory: mp4 with picture and sound, FLAC and wav.

Sound and picture are placed by presentation time stamps. An AAC encoder puts 1024 samples of its own before the first
one; the mp4 edit list takes them off again, so a reader that goes by time stamps sees both start at 0.
"""

import io
import wave as wave_file
from collections.abc import Iterable, Iterator
from fractions import Fraction
from heapq import merge
from pathlib import Path
from typing import IO

import av
import numpy as np
from av.container import OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from pipelines.errors import MediaError

AUDIO_BITS_PER_SAMPLE = 4
"""64 kb/s at 16 kHz, 176 kb/s at 44.1 kHz."""
AUDIO_OPTIONS = {"aac_coder": "fast"}
"""A third of the time of FFmpeg's default search, at a bit rate where the difference is not heard."""
VIDEO_OPTIONS = {"preset": "ultrafast", "crf": "18"}
FULL_SCALE = 32768
"""int16 sample k stands for k / 32768."""


def write_mp4(
    destination: str | Path | IO[bytes],
    frames: np.ndarray,
    rate_hz: Fraction | int,
    wave: np.ndarray,
    sample_rate_hz: int,
) -> None:
    """Write H.264 (ultrafast, crf 18) and AAC (4 bits a sample), both from time 0.

    Args:
        destination: a path, or an open binary file that can seek.
        frames: uint8 [T, H, W, 3], T > 0, H and W even; frame i is shown from second i / rate_hz.
        rate_hz: frames a second.
        wave: float [S] in [-1, 1], mono; ends where it ends, so give it T / rate_hz seconds.
        sample_rate_hz: one of AAC's rates (8000 ... 96000).

    Raises:
        ValueError: shapes, dtype or rate that cannot be written.
        OSError: the storage refuses.
    """
    if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 [T, H, W, 3]")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames are {frames.shape[2]}x{frames.shape[1]}, H.264 needs an even width and height")
    target = str(destination) if isinstance(destination, Path) else destination
    with av.open(target, "w", format="mp4") as out:
        picture = out.add_stream("libx264", rate=Fraction(rate_hz), options=VIDEO_OPTIONS)
        picture.width, picture.height, picture.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        # One thread: the bytes do not depend on the machine.
        picture.codec_context.thread_count = 1
        sound = SoundEncoder(out, sample_rate_hz)
        for packet in merge(_encoded_pictures(picture, frames, rate_hz), sound.packets([wave]), key=decode_time):
            out.mux(packet)


def _encoded_pictures(stream: VideoStream, frames: np.ndarray, rate_hz: Fraction | int) -> Iterator[Packet]:
    for i, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = i, 1 / Fraction(rate_hz)
        yield from stream.encode(frame)
    yield from stream.encode(None)


class SoundEncoder:
    """AAC in an output container."""

    def __init__(self, out: OutputContainer, rate_hz: int) -> None:
        """Adds the stream; raises ValueError where AAC does not take the rate."""
        self._stream = out.add_stream(
            "aac", rate=rate_hz, layout="mono", bit_rate=AUDIO_BITS_PER_SAMPLE * rate_hz, options=AUDIO_OPTIONS
        )
        self._rate_hz = rate_hz
        allowed = self._stream.codec_context.codec.audio_rates or []
        if rate_hz not in allowed:
            raise ValueError(f"AAC does not take {rate_hz} Hz; it takes {sorted(allowed)}")

    def packets(self, blocks: Iterable[np.ndarray]) -> Iterator[Packet]:
        """Packets of a mono waveform that starts at time 0 and comes in blocks, float [S] in [-1, 1]."""
        for frame in sound_frames(map(checked_sound, blocks), self._rate_hz, "fltp"):
            yield from self._stream.encode(frame)
        yield from self._stream.encode(None)


def sound_frames(blocks: Iterable[np.ndarray], rate_hz: int, sample_format: str) -> Iterator[av.AudioFrame]:
    """Mono frames that follow each other from time 0; blocks are of the dtype that the format wants."""
    done = 0
    for block in blocks:
        frame = av.AudioFrame.from_ndarray(block[None], format=sample_format, layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, done, Fraction(1, rate_hz)
        done += len(block)
        yield frame


def checked_sound(wave: np.ndarray) -> np.ndarray:
    """Float [S] -> float32 [S] clipped to [-1, 1]; raises ValueError where it is not [S], empty or not finite."""
    if wave.ndim != 1 or not len(wave) or not np.isfinite(wave).all():
        raise ValueError(f"sound of shape {wave.shape} must be [S], not empty and finite")
    return np.clip(wave, -1.0, 1.0).astype(np.float32)


def decode_time(packet: Packet) -> Fraction:
    """Seconds of a packet's decoding time stamp, by its own time base; packets are interleaved by it."""
    if packet.dts is None or packet.time_base is None:
        return Fraction(0)
    return packet.dts * packet.time_base


def to_int16(wave: np.ndarray) -> np.ndarray:
    """Float [S] in [-1, 1] -> int16 [S], rounded; raises ValueError as `checked_sound`."""
    return np.clip(np.rint(checked_sound(wave) * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def encode_flac(wave: np.ndarray, rate_hz: int) -> bytes:
    """Float [S] in [-1, 1], mono -> a FLAC file of 16 bit; samples k / 32768 survive exactly.

    Raises:
        ValueError: not [S], empty, or not finite.
    """
    sink = io.BytesIO()
    with av.open(sink, "w", format="flac") as out:
        stream = out.add_stream("flac", rate=rate_hz, layout="mono", format="s16")
        for frame in sound_frames([to_int16(wave)], rate_hz, "s16"):
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return sink.getvalue()


def decode_flac(content: bytes) -> np.ndarray:
    """A mono 16-bit FLAC file, as `encode_flac` makes it -> float32 [S], int16 / 32768.

    Raises:
        MediaError: not such a file, or a damaged one.
    """
    try:
        with av.open(io.BytesIO(content), "r", format="flac") as container:
            promised = container.streams.audio[0].duration
            parts = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    except (av.FFmpegError, IndexError) as error:
        raise MediaError("not_media", f"not a FLAC file: {error}") from error
    samples = np.concatenate(parts) if parts else np.zeros(0, np.int16)
    if len(samples) != promised:
        reason = "not_media" if promised is None else "truncated"
        raise MediaError(reason, f"FLAC holds {len(samples)} samples, its header promises {promised}")
    if samples.dtype != np.int16:
        raise MediaError("unsupported_codec", f"FLAC holds {samples.dtype}, expected 16 bit")
    return samples.astype(np.float32) / FULL_SCALE


def wav_bytes(wave: np.ndarray, rate_hz: int) -> bytes:
    """Float [S] in [-1, 1], mono -> a wav file of 16 bit.

    Raises:
        ValueError: not [S], empty, or not finite.
    """
    sink = io.BytesIO()
    with wave_file.open(sink, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        out.writeframes(to_int16(wave).tobytes())
    return sink.getvalue()
