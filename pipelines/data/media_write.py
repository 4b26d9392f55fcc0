"""The writer of media: mp4 with picture and sound, sound put under a copied picture, FLAC and wav.

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
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from pipelines.data.media import open_media
from pipelines.errors import InputError, MediaError

AUDIO_BITS_PER_S = 64_000
AUDIO_OPTIONS = {"aac_coder": "fast"}
"""A third of the time of FFmpeg's default search, at a bit rate where the difference is not heard."""
VIDEO_OPTIONS = {"preset": "ultrafast", "crf": "18"}
MAX_PIXELS = 8192 * 8192
HEVC_APPLE_TAG = "hvc1"
"""Kept where the source has it: some players refuse H.265 under the tag that FFmpeg gives by itself."""
FULL_SCALE = 32768
"""int16 sample k stands for k / 32768."""


def write_mp4(
    destination: str | Path | IO[bytes],
    frames: np.ndarray,
    rate_hz: Fraction | int,
    wave: np.ndarray,
    sample_rate_hz: int,
) -> None:
    """Write H.264 (ultrafast, crf 18) and AAC (64 kb/s), both from time 0.

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
        sound = _SoundEncoder(out, sample_rate_hz)
        for packet in merge(_encoded_pictures(picture, frames, rate_hz), sound.packets(wave), key=_decode_time):
            out.mux(packet)


def _encoded_pictures(stream: VideoStream, frames: np.ndarray, rate_hz: Fraction | int) -> Iterator[Packet]:
    for i, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = i, 1 / Fraction(rate_hz)
        yield from stream.encode(frame)
    yield from stream.encode(None)


class _SoundEncoder:
    """AAC in an output container."""

    def __init__(self, out: OutputContainer, rate_hz: int) -> None:
        self._stream = out.add_stream(
            "aac", rate=rate_hz, layout="mono", bit_rate=AUDIO_BITS_PER_S, options=AUDIO_OPTIONS
        )
        self._rate_hz = rate_hz
        allowed = self._stream.codec_context.codec.audio_rates or []
        if rate_hz not in allowed:
            raise ValueError(f"AAC does not take {rate_hz} Hz; it takes {sorted(allowed)}")

    def packets(self, wave: np.ndarray) -> Iterator[Packet]:
        """Packets of a mono waveform [S] that starts at time 0."""
        frame = av.AudioFrame.from_ndarray(_checked(wave)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = self._rate_hz, 0, Fraction(1, self._rate_hz)
        yield from self._stream.encode(frame)
        yield from self._stream.encode(None)


def _checked(wave: np.ndarray) -> np.ndarray:
    if wave.ndim != 1 or not len(wave) or not np.isfinite(wave).all():
        raise ValueError(f"sound of shape {wave.shape} must be [S], not empty and finite")
    return np.clip(wave, -1.0, 1.0).astype(np.float32)


def _decode_time(packet: Packet) -> Fraction:
    if packet.dts is None or packet.time_base is None:
        return Fraction(0)
    return packet.dts * packet.time_base


def mux_with_copied_video(source: str | Path, wave: np.ndarray, rate_hz: int, destination: str | Path) -> None:
    """Put a new sound under the picture of a video file; the picture's packets are copied, not encoded again.

    The sound starts at the file's own time 0 and is cut, or filled with silence, to the end of the picture; the
    source's own sound and other streams are left out. The result appears under its name only when complete.

    Args:
        source: a media file with a moving picture.
        wave: float [S] in [-1, 1], mono.
        rate_hz: one of AAC's rates.
        destination: path of the mp4 to write.

    Raises:
        InputError: the source cannot be read, has no picture, or one that mp4 does not hold.
        ValueError: the sound cannot be written.
    """
    temporary = Path(f"{destination}.part")
    try:
        with Path(source).open("rb") as file, open_media(file, MAX_PIXELS) as container:
            video = _moving_picture(container, source)
            packets = [p for p in container.demux(video) if p.dts is not None and p.size]
            start = Fraction(container.start_time or 0, av.time_base)
            _write_copied(temporary, video, packets, start, wave, rate_hz)
        temporary.replace(destination)
    except (MediaError, av.FFmpegError) as error:
        raise InputError(f"{source} cannot be given another sound: {error}; give an intact video file") from error
    finally:
        temporary.unlink(missing_ok=True)


def picture_duration_s(source: str | Path) -> float:
    """Seconds from a file's own time 0 to the end of its picture, from its packets; nothing is decoded.

    This is how long the sound of `mux_with_copied_video` becomes.

    Raises:
        InputError: the source cannot be read or has no picture.
    """
    try:
        with Path(source).open("rb") as file, open_media(file, MAX_PIXELS) as container:
            video = _moving_picture(container, source)
            ends = [_end(packet) for packet in container.demux(video) if packet.size]
            if not ends or video.time_base is None:
                raise MediaError("empty", "its picture has no packets")
            return float(max(ends) * video.time_base - Fraction(container.start_time or 0, av.time_base))
    except (OSError, MediaError, av.FFmpegError) as error:
        raise InputError(f"{source} cannot be read: {error}; give an intact video file") from error


def _moving_picture(container: InputContainer, source: str | Path) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & (Disposition.attached_pic | Disposition.still_image):
            return stream
    raise InputError(f"{source} has no moving picture; give a video file")


def _write_copied(
    path: Path, video: VideoStream, packets: list[Packet], start: Fraction, wave: np.ndarray, rate_hz: int
) -> None:
    if not packets or video.time_base is None:
        raise MediaError("empty", "its picture has no packets")
    unit = video.time_base
    shift = round(start / unit)
    end = max(map(_end, packets)) - shift
    with av.open(str(path), "w", format="mp4") as out:
        try:
            picture = out.add_stream_from_template(video, opaque=True)
        except ValueError as error:
            raise MediaError("unsupported_codec", str(error)) from error
        if video.codec_context.codec_tag == HEVC_APPLE_TAG:
            picture.codec_context.codec_tag = HEVC_APPLE_TAG
        sound = _SoundEncoder(out, rate_hz)
        # Merged by the source's clock, then handed to the new file's streams.
        fitted = _fit(wave, round(end * unit * rate_hz))
        for packet in merge(_shifted(packets, shift), sound.packets(fitted), key=_decode_time):
            if packet.stream is video:
                packet.stream = picture
            out.mux(packet)


def _end(packet: Packet) -> int:
    """When a packet's frame stops being shown, in its time base."""
    return (packet.pts if packet.pts is not None else packet.dts or 0) + (packet.duration or 0)


def _shifted(packets: Iterable[Packet], shift: int) -> Iterator[Packet]:
    for packet in packets:
        packet.dts = None if packet.dts is None else packet.dts - shift
        packet.pts = None if packet.pts is None else packet.pts - shift
        yield packet


def _fit(wave: np.ndarray, num_samples: int) -> np.ndarray:
    return np.pad(wave[:num_samples], (0, max(num_samples - len(wave), 0)))


def _int16(wave: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(_checked(wave) * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def encode_flac(wave: np.ndarray, rate_hz: int) -> bytes:
    """Float [S] in [-1, 1], mono -> a FLAC file of 16 bit; samples k / 32768 survive exactly.

    Raises:
        ValueError: not [S], empty, or not finite.
    """
    sink = io.BytesIO()
    with av.open(sink, "w", format="flac") as out:
        stream = out.add_stream("flac", rate=rate_hz, layout="mono", format="s16")
        frame = av.AudioFrame.from_ndarray(_int16(wave)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
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
        out.writeframes(_int16(wave).tobytes())
    return sink.getvalue()
