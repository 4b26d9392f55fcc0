"""The reader: one pass over a media file by presentation time, for picture and sound together.

This runs inside the disposable decode child (`decode_child.py`), so it imports PyAV, numpy and, where asked, Pillow. It
is given an open file, never a name or a URL: nothing in a file can make it open another one. What a file may hold is a
closed list, and its picture size is checked before the first frame is decoded.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import IO

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from pipelines.data.media_avi import MAX_LOST_S, AviPlaces, lost_s
from pipelines.data.media_size import refused_size
from pipelines.data.media_tracks import PictureTrack, Skipped, SoundTrack, WindowClock
from pipelines.data.window import DecodedWindow, MediaInfo, SourceFormat, WindowRequest
from pipelines.errors import MediaError

FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "wav", "flac", "mp3", "ogg")
VIDEO_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "mpeg4"})
AUDIO_CODECS = frozenset(
    {"aac", "mp3", "mp3float", "opus", "libopus", "vorbis", "flac", "ac3", "eac3", "dca"}
    | {name for name in av.codecs_available if name.startswith("pcm_")}
)
MAX_STREAMS = 64
SEEK_MARGIN_S = 1.0
"""A window is sought this much early, so that decoders have settled when it starts."""
MIN_BYTES_PER_S = 32
"""No file holds more seconds than its bytes allow at this rate (256 bit/s): a header may claim years."""
CONTAINER_MAGIC = (b"\x1aE\xdf\xa3", b"RIFF", b"OggS", b"fLaC", b"ID3")
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"moof")
LOOKS_CUT = frozenset({"no_video", "no_audio", "unsupported_codec", "empty", "too_short", "not_media"})
"""What a file whose header was cut seems to be."""
STILL_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*")


class _Unnamed:
    """An open file without its name: FFmpeg would guess the format from the suffix."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read = file.read
        self.seek = file.seek
        self.tell = file.tell


def _refuse_open(url: str, flags: int, options: dict[str, str]) -> IO[bytes]:
    raise PermissionError(f"the file refers to another one: {url[:80]}")


def open_media(file: IO[bytes], max_pixels: int) -> InputContainer:
    """Open a media file for reading, whatever its name.

    Raises:
        MediaError: empty, not_media, truncated (its header is that of a known container), no_video (a still image).
    """
    head = file.read(16)
    file.seek(0)
    if not head:
        raise MediaError("empty", "the file has no bytes")
    try:
        container = av.open(
            _Unnamed(file),
            mode="r",
            options={"max_pixels": str(max_pixels)},
            container_options={
                "format_whitelist": ",".join(FORMATS),
                "codec_whitelist": ",".join(sorted(VIDEO_CODECS | AUDIO_CODECS)),
                "protocol_whitelist": "none",
                "max_streams": str(MAX_STREAMS),
            },
            metadata_errors="replace",
            io_open=_refuse_open,
        )
    except (av.FFmpegError, PermissionError, UnicodeError) as error:
        if head.startswith(STILL_MAGIC):
            raise MediaError("no_video", "a still image") from error
        known = head.startswith(CONTAINER_MAGIC) or head[4:8] in MP4_BOXES
        reason = "truncated" if known else "not_media"
        raise MediaError(reason, f"cannot be opened: {error}") from error
    if not container.streams:
        container.close()
        raise MediaError("empty", "the container holds no streams")
    return container


def _find_video(container: InputContainer, max_pixels: int) -> VideoStream:
    stills = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if not s.disposition & stills]
    if not streams:
        raise MediaError("no_video", "the file has no moving picture")
    best = container.streams.best("video")
    stream = next((s for s in streams if s is best), streams[0])
    _check_codec(stream, VIDEO_CODECS)
    pixels = stream.codec_context.width * stream.codec_context.height
    if pixels > max_pixels:
        size = f"{stream.codec_context.width}x{stream.codec_context.height}"
        raise MediaError("too_large", f"{size} is more than {max_pixels} pixels")
    # A decoder that makes up what is damaged shows a picture that never was: it has to say so instead.
    stream.codec_context.options = {"max_pixels": str(max_pixels), "err_detect": "explode"}
    return stream


def _find_audio(container: InputContainer) -> AudioStream:
    best = container.streams.best("audio")
    stream = next((s for s in container.streams.audio if s is best), next(iter(container.streams.audio), None))
    if stream is None:
        raise MediaError("no_audio", "the file has no sound")
    _check_codec(stream, AUDIO_CODECS)
    return stream


def _check_codec(stream: Stream, allowed: frozenset[str]) -> None:
    # PyAV gives no codec context at all where FFmpeg has no decoder.
    context = stream.codec_context
    if context is None or context.name not in allowed:
        name = "unknown" if context is None else context.name
        raise MediaError("unsupported_codec", f"{stream.type} is '{name}', accepted are {', '.join(sorted(allowed))}")
    context.thread_count = 1


def _origin(container: InputContainer) -> Fraction:
    """The file's own start: the earliest time stamp of its streams, seconds."""
    return Fraction(container.start_time or 0, 1_000_000)


def _stream_end(container: InputContainer, stream: Stream) -> Fraction | None:
    """Where the container says that a stream ends, seconds from the file's own start."""
    if stream.duration is not None and stream.time_base is not None:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base - _origin(container)
    return None if container.duration is None else Fraction(container.duration, 1_000_000)


def probe(file: IO[bytes], max_pixels: int) -> MediaInfo:
    """What the container says of itself; of its length no more than its bytes can hold.

    Raises:
        MediaError: as `open_media`.
    """
    with open_media(file, max_pixels) as container:
        video = next(iter(container.streams.video), None)
        audio = next(iter(container.streams.audio), None)
        ends = [None if s is None else _stream_end(container, s) for s in (video, audio)]
        longest = Fraction(file.seek(0, 2), MIN_BYTES_PER_S)
        picture_s, sound_s = (None if end is None else float(min(end, longest)) for end in ends)
        known = [end_s for end_s in (picture_s, sound_s) if end_s is not None]
        return MediaInfo(
            duration_s=min(known) if known else None,
            sound_s=sound_s,
            has_video=video is not None,
            has_audio=audio is not None,
            width=video.codec_context.width if video is not None else 0,
            height=video.codec_context.height if video is not None else 0,
        )


def read_window(file: IO[bytes], request: WindowRequest) -> DecodedWindow:
    """Decode one window; see `WindowRequest` and `DecodedWindow` for shapes, units and ranges.

    Raises:
        MediaError: any reason that lies in the file itself.
    """
    try:
        decoded = _read(file, request, seek=True) if request.start_s > 2 * SEEK_MARGIN_S else None
        decoded = decoded or _read(file, request, seek=False)
    except MediaError as error:
        if error.reason == "truncated" and request.grids and (size := _refused_size(file, request.max_pixels)):
            raise MediaError("too_large", f"the picture declares {size}; allowed are {request.max_pixels}") from error
        if error.reason in LOOKS_CUT and (_is_cut_mp4(file) or _is_cut_riff(file)):
            raise MediaError("truncated", f"the file ends before its header says; {error.detail}") from error
        raise
    if decoded is None:
        raise RuntimeError("reading from the start of a file cannot start late")
    return decoded


def _refused_size(file: IO[bytes], max_pixels: int) -> str | None:
    def reopen() -> InputContainer:
        file.seek(0)
        container = open_media(file, max_pixels)
        for stream in container.streams.video:
            if stream.codec_context is None:
                continue
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(max_pixels)}
        return container

    return refused_size(reopen)


def _read(file: IO[bytes], request: WindowRequest, *, seek: bool) -> DecodedWindow | None:
    """One pass, or two where frames were passed over that must not be; None when seeking landed too late."""
    for skip in (True, False):
        file.seek(0)
        try:
            return _WindowReader(file, request, seek=seek, skip=skip).read()
        except Skipped:
            continue
    raise RuntimeError("nothing is passed over in the second pass")


def _is_cut_mp4(file: IO[bytes]) -> bool:
    """Whether the last top-level box of an mp4 runs past the end of the file."""
    end = file.seek(0, 2)
    position = 0
    while position + 8 <= end:
        file.seek(position)
        header = file.read(16)
        if position == 0 and header[4:8] not in MP4_BOXES:
            return False
        size = int.from_bytes(header[:4], "big")
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if size < 8:
            # 0 means "to the end of the file"; less than a header is damage, not a cut.
            return False
        position += size
    return position > end


def _is_cut_riff(file: IO[bytes]) -> bool:
    """Whether the last top-level chunk of an avi or a wav runs past the end of the file."""
    end = file.seek(0, 2)
    position = 0
    while position + 8 <= end:
        file.seek(position)
        header = file.read(8)
        size = int.from_bytes(header[4:], "little")
        # 0 and all ones mean that the writer never came back to say.
        if header[:4] != b"RIFF" or size in (0, 0xFFFFFFFF):
            return False
        position += 8 + size
    return position > end


def _check_length(container: InputContainer, max_file_s: float | None) -> None:
    length_s = (container.duration or 0) / 1_000_000
    if max_file_s is not None and length_s > max_file_s:
        raise MediaError("too_long", f"{length_s:.1f} s by its header, {max_file_s:g} s are allowed")


def _source_format(video: VideoStream | None, audio: AudioStream | None) -> SourceFormat:
    rate = video.average_rate if video is not None else None
    return SourceFormat(
        width=video.codec_context.width if video is not None else None,
        height=video.codec_context.height if video is not None else None,
        fps=float(rate) if rate else None,
        rate_hz=audio.codec_context.sample_rate if audio is not None else None,
        channels=audio.codec_context.layout.nb_channels if audio is not None else None,
    )


class _WindowReader:
    """One pass over one file."""

    def __init__(self, file: IO[bytes], request: WindowRequest, *, seek: bool, skip: bool) -> None:
        self._request = request
        self._seek = seek
        self._container = open_media(file, request.max_pixels)
        _check_length(self._container, request.max_file_s)
        self._video = _find_video(self._container, request.max_pixels) if request.grids else None
        self._audio = _find_audio(self._container) if request.audio_samples else None
        self._clock = WindowClock(_origin(self._container) + Fraction(request.start_s))
        self._is_avi = self._container.format.name == "avi"
        self._picture = None
        if self._video is not None:
            self._picture = PictureTrack(self._video, self._clock, request, skip=skip, timed=not self._is_avi)
        self._sound = SoundTrack(self._audio, self._clock, request) if self._audio is not None else None
        self._broken: str | None = None

    def read(self) -> DecodedWindow | None:
        """The window, or None when seeking landed after its start."""
        with self._container:
            if self._seek and not self._seek_to_start():
                return None
            for packet in self._packets():
                part = self._picture if packet.stream is self._video else self._sound
                if part is None or part.done:
                    continue
                part.read(packet)
                if self._seek and part.started_late:
                    return None
                if part.done and self._done():
                    break
            decoded = self._finish()
            late = self._seek and any(part is not None and part.started_late for part in (self._picture, self._sound))
            return None if late else decoded

    def _seek_to_start(self) -> bool:
        target = max(float(self._clock.zero) - SEEK_MARGIN_S, 0.0)
        try:
            self._container.seek(int(target * 1_000_000), backward=True)
        except av.FFmpegError:
            return False
        return True

    def _done(self) -> bool:
        return all(part is None or part.done for part in (self._picture, self._sound))

    def _packets(self) -> Iterator[Packet]:
        """Packets of the tracks that are wanted, in the file's order, up to its end or to where it cannot be read."""
        wanted = [s for s in (self._video, self._audio) if s is not None]
        zero, margin_s = self._clock.zero, Fraction(SEEK_MARGIN_S)
        places = None
        if self._is_avi:
            if self._video is not None and lost_s(self._video) > MAX_LOST_S:
                raise MediaError("truncated", "the index of the AVI has holes, so that no time is known")
            places = AviPlaces(wanted, zero - margin_s, zero + Fraction(self._request.duration_s) + margin_s)
        packets = self._container.demux(wanted)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                self._broken = f"reading stops: {error}"
                return
            if packet is None:
                return
            if places is not None and places.is_displaced(packet):
                raise MediaError("truncated", "parts before this window are lost, so that its time is not known")
            yield packet

    def _finish(self) -> DecodedWindow:
        request = self._request
        valid_s = request.duration_s
        for part, stream, wanted_s in (
            (self._picture, self._video, request.duration_s),
            (self._sound, self._audio, request.audio_samples / request.audio_rate_hz),
        ):
            if part is None or stream is None:
                continue
            real_s = part.finish()
            if real_s < (1 - request.max_missing) * wanted_s:
                raise self._incomplete(stream, real_s, wanted_s, part.broken or self._broken)
            valid_s = min(valid_s, real_s)
        return DecodedWindow(
            frames=self._picture.frames if self._picture is not None else (),
            audio=self._sound.samples if self._sound is not None else None,
            audio_rate_hz=self._sound.rate_hz if self._sound is not None else 0,
            audio_margin=self._sound.margin if self._sound is not None else 0,
            valid_s=valid_s,
            source=_source_format(self._video, self._audio),
        )

    def _incomplete(self, stream: Stream, real_s: float, wanted_s: float, broken: str | None) -> MediaError:
        detail = f"{stream.type} covers {real_s:.3f} of {wanted_s:.3f} s"
        if broken is not None:
            return MediaError("truncated", f"{detail}; {broken}")
        end = _stream_end(self._container, stream)
        promised_s = 0.0 if end is None else float(end) - self._request.start_s
        if promised_s >= (1 - self._request.max_missing) * wanted_s:
            return MediaError("truncated", f"{detail}, the header promises {promised_s:.3f} s")
        # A file with no time in it at all is empty; one that merely ends before the window is too short.
        if (end is None or end <= 0) and real_s == 0:
            return MediaError("empty", f"{detail}, and the file has no duration")
        return MediaError("too_short", detail)
