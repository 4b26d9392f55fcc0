"""Sound that comes in blocks -> a file, under a copied picture or by itself; nothing is ever whole in memory.

Blocks are asked for as they are written, so whoever makes them works in step with the writer. A file appears under its
name only when complete.
"""

import wave as wave_file
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from heapq import merge
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from pipelines.data.media import open_media
from pipelines.data.media_write import SoundEncoder, decode_time, sound_frames, to_int16
from pipelines.errors import EnvironmentFailed, InputError, MediaError

MAX_PIXELS = 8192 * 8192
HEVC_APPLE_TAG = "hvc1"
"""Kept where the source has it: some players refuse H.265 under the tag that FFmpeg gives by itself."""
MAX_UNTIMED = 64
"""More than any codec holds pictures back."""
SOUND_SUFFIXES = (".wav", ".flac")


def picture_duration_s(source: str | Path) -> float:
    """Seconds from a file's own time 0 to the end of its picture, from its packets; nothing is decoded.

    Raises:
        InputError: the source cannot be read or has no picture.
    """
    try:
        with Path(source).open("rb") as file, open_media(file, MAX_PIXELS) as container:
            video = _moving_picture(container, source)
            end = max((_end(packet) for packet in container.demux(video) if packet.size), default=None)
            if end is None or video.time_base is None:
                raise MediaError("empty", "its picture has no packets")
            return float(end * video.time_base - _origin_s(container))
    except (OSError, MediaError, av.FFmpegError) as error:
        raise InputError(f"{source} cannot be read: {error}; give an intact video file") from error


def mux_with_copied_video(
    source: str | Path, blocks: Iterable[np.ndarray], rate_hz: int, destination: str | Path
) -> None:
    """Put a new sound under the picture of a video file; the picture's packets are copied, not encoded again.

    The sound starts at the file's own time 0; the source's own sound and other streams are left out. Whether the
    picture fits into an mp4 is known before the first block is asked for.

    Args:
        source: a media file with a moving picture.
        blocks: float [S] in [-1, 1], mono, one after the other; give `picture_duration_s` of them.
        rate_hz: one of AAC's rates.
        destination: path of the mp4 to write.

    Raises:
        InputError: the source cannot be read, has no picture, or one that mp4 does not hold.
        EnvironmentFailed: the destination cannot be written.
        ValueError: the sound cannot be written.
    """
    with (
        _readable(source),
        Path(source).open("rb") as file,
        open_media(file, MAX_PIXELS) as container,
        _appearing(Path(destination)) as temporary,
        av.open(str(temporary), "w", format="mp4") as out,
    ):
        video = _moving_picture(container, source)
        picture, sound = _mp4_streams(out, video, rate_hz)
        # Merged by the source's clock, then handed to the new file's streams.
        for packet in merge(_copied(container, video), sound.packets(blocks), key=decode_time):
            if packet.stream is video:
                packet.stream = picture
            out.mux(packet)


def write_sound(blocks: Iterable[np.ndarray], rate_hz: int, destination: str | Path) -> None:
    """Write sound that comes in blocks as wav or FLAC of 16 bit, mono, by the destination's suffix.

    Args:
        blocks: float [S] in [-1, 1], one after the other. A wav holds at most 4 GiB of them.
        rate_hz: samples a second.
        destination: path, ending in one of `SOUND_SUFFIXES`.

    Raises:
        EnvironmentFailed: the destination cannot be written.
        ValueError: another suffix, or the sound cannot be written.
    """
    suffix = Path(destination).suffix.lower()
    if suffix not in SOUND_SUFFIXES:
        raise ValueError(f"{destination} must end in {' or '.join(SOUND_SUFFIXES)}")
    with _appearing(Path(destination)) as temporary:
        write = _write_wav if suffix == ".wav" else _write_flac
        write(map(to_int16, blocks), rate_hz, temporary)


def _write_wav(blocks: Iterable[np.ndarray], rate_hz: int, path: Path) -> None:
    with path.open("wb") as file, wave_file.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        for block in blocks:
            out.writeframesraw(block.tobytes())


def _write_flac(blocks: Iterable[np.ndarray], rate_hz: int, path: Path) -> None:
    with av.open(str(path), "w", format="flac") as out:
        stream = out.add_stream("flac", rate=rate_hz, layout="mono", format="s16")
        for frame in sound_frames(blocks, rate_hz, "s16"):
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@contextmanager
def _appearing(destination: Path) -> Iterator[Path]:
    """A name beside `destination`; what is written there takes its place when the block ends without an error."""
    temporary = destination.with_name(f"{destination.name}.part")
    try:
        yield temporary
        temporary.replace(destination)
    except OSError as error:
        raise EnvironmentFailed(
            f"cannot write {destination}: {error}; free or mount the storage and run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _readable(source: str | Path) -> Iterator[None]:
    """What is wrong with the source becomes one line."""
    try:
        yield
    except (OSError, MediaError, av.FFmpegError) as error:
        raise InputError(
            f"{source} cannot be given another sound: {error}; give an intact video whose picture fits into an mp4, or "
            "take the sound alone, as .wav or .flac"
        ) from error


def _moving_picture(container: InputContainer, source: str | Path) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & (Disposition.attached_pic | Disposition.still_image):
            return stream
    raise InputError(f"{source} has no moving picture; give a video file")


def _mp4_streams(out: OutputContainer, video: VideoStream, rate_hz: int) -> tuple[VideoStream, SoundEncoder]:
    """The streams of the new file, with its header written."""
    try:
        picture = out.add_stream_from_template(video, opaque=True)
        if video.codec_context.codec_tag == HEVC_APPLE_TAG:
            picture.codec_context.codec_tag = HEVC_APPLE_TAG
    except ValueError as error:
        raise MediaError("unsupported_codec", str(error)) from error
    sound = SoundEncoder(out, rate_hz)
    out.start_encoding()
    return picture, sound


def _copied(container: InputContainer, video: VideoStream) -> Iterator[Packet]:
    """The packets of the picture, on a clock that starts at the file's own time 0."""
    shift = round(_origin_s(container) / (video.time_base or 1))
    # The last packet of a stream is an empty one, a sign for decoders.
    for packet in _with_decode_times(p for p in container.demux(video) if p.size):
        packet.dts = None if packet.dts is None else packet.dts - shift
        packet.pts = None if packet.pts is None else packet.pts - shift
        yield packet


def _with_decode_times(packets: Iterator[Packet]) -> Iterator[Packet]:
    """The same packets, all with a decoding time.

    Matroska stores presentation times alone, and FFmpeg knows the first decoding times only once it has seen how far
    pictures are reordered. What it leaves open is filled in backwards from the first known one.

    Raises:
        MediaError: `MAX_UNTIMED` packets or more are without.
    """
    untimed: list[Packet] = []
    for packet in packets:
        if packet.dts is None:
            untimed.append(packet)
            if len(untimed) == MAX_UNTIMED:
                raise MediaError("unsupported_codec", "its packets have no decoding times")
            continue
        _fill_backwards(untimed, packet.dts)
        yield from untimed
        untimed.clear()
        yield packet
    _fill_backwards(untimed, min((p.pts for p in untimed if p.pts is not None), default=0) + 1)
    yield from untimed


def _fill_backwards(untimed: list[Packet], known: int) -> None:
    for packet in reversed(untimed):
        known -= max(packet.duration or 0, 1)
        packet.dts = known


def _origin_s(container: InputContainer) -> Fraction:
    return Fraction(container.start_time or 0, av.time_base)


def _end(packet: Packet) -> int:
    """When a packet's frame stops being shown, in its time base."""
    return (packet.pts if packet.pts is not None else packet.dts or 0) + (packet.duration or 0)
