"""Media files with real faults: cut, patched, spliced, bombs, hours long, numbered pictures."""

import struct
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from pipelines.data.contracts import FEATURES
from pipelines.data.media_folder import list_videos
from pipelines.data.preprocess import preprocess
from pipelines.data.preprocess_settings import PreprocessSettings
from pipelines.data.store import Dataset
from pipelines.data.units import HERE
from pipelines.errors import Refused

NUMBER_BITS = 8
NUMBER_BLOCK_PX = 16
NUMBER_RATE_HZ = 10


def made(folder: Path, *, out: str = "out", max_reject_rate: float = 1.0, **options: object) -> Dataset:
    """The dataset `out`, beside a folder of clips, made in this process; also where nothing at all could be used."""
    settings = PreprocessSettings(spec="tiny", encoders="grids", **options)  # pyright: ignore[reportArgumentType]
    place = str(folder.with_name(out))
    try:
        preprocess(list_videos(str(folder)), settings, out=place, pool=HERE, max_reject_rate=max_reject_rate)
    except Refused:
        if max_reject_rate < 1.0:
            raise
    return Dataset.open(place, FEATURES)


def outcomes(dataset: Dataset) -> dict[str, str]:
    """What became of every clip: `row`, or the reason of its reject; checks that each is told of once."""
    taken = dataset.read(["clip_id"])["clip_id"].to_pylist()
    rejects = dataset.read_rejects().to_pylist()
    told = {**dict.fromkeys(taken, "row"), **{r["clip_id"]: r["reason"] for r in rejects}}
    assert len(told) == len(taken) + len(rejects) == dataset.manifest["counts"]["in"]
    return told


def patched(path: Path, source: bytes, old: bytes, new: bytes) -> Path:
    """Write `source` with every `old` replaced by as many bytes; there must be one."""
    assert old in source
    assert len(old) == len(new)
    path.write_bytes(source.replace(old, new))
    return path


def write_cover_art(path: Path) -> Path:
    """A song with a picture on its sleeve: the only video stream is an attached still."""
    with av.open(str(path), "w") as out:
        sound = out.add_stream("aac", rate=16_000, layout="mono")
        cover = out.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8), format="rgb24")
        frame.pts, frame.time_base = 0, Fraction(1)
        wave = av.AudioFrame.from_ndarray(_steps(3.0, 16_000, lambda t: 440.0)[None], format="flt", layout="mono")
        wave.sample_rate, wave.pts = 16_000, 0
        for packet in (*cover.encode(frame), *cover.encode(None), *sound.encode(wave), *sound.encode(None)):
            out.mux(packet)
    return path


def write_no_frames(path: Path) -> Path:
    """A container with two tracks and nothing in them."""
    with av.open(str(path), "w") as out:
        picture = out.add_stream("mpeg4", rate=25)
        picture.width = picture.height = 64
        out.add_stream("aac", rate=16_000, layout="mono")
        out.start_encoding()
    return path


def write_hours(path: Path, hours: int) -> Path:
    """One 16 x 16 picture a second, brighter by 60 every hour, and clicks at 8 kHz: hours of media in few bytes.

    A minute of every hour is encoded once, and its packets are written 60 times.
    """
    with av.open(str(path), "w") as out:
        for hour in range(hours):
            packets, streams = _one_minute(path.with_name(f"minute-{hour}.mkv"), 40 + 60 * hour)
            if hour == 0:
                targets = [out.add_stream_from_template(stream) for stream in streams]
            for minute in range(60):
                for index, time_s, base, content, key in packets:
                    packet = av.Packet(content)
                    packet.pts = packet.dts = round((time_s + 3600 * hour + 60 * minute) / base)
                    packet.time_base, packet.is_keyframe, packet.stream = base, key, targets[index]
                    out.mux(packet)
    return path


def _one_minute(
    path: Path, level: int
) -> tuple[list[tuple[int, Fraction, Fraction, bytes, bool]], list[av.stream.Stream]]:
    with av.open(str(path), "w") as out:
        picture = out.add_stream("mpeg4", rate=1)
        picture.width = picture.height = 16
        sound = out.add_stream("flac", rate=8000, layout="mono", format="s16")
        clicks = np.zeros((1, 8000), np.int16)
        clicks[0, ::400] = 8000
        for second in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = second, Fraction(1)
            block = av.AudioFrame.from_ndarray(clicks, format="s16", layout="mono")
            block.sample_rate, block.pts = 8000, second * 8000
            for packet in (*picture.encode(frame), *sound.encode(block)):
                out.mux(packet)
        for packet in (*picture.encode(None), *sound.encode(None)):
            out.mux(packet)
    # The file stays open, because its streams are the templates of the copy.
    source = av.open(str(path))
    packets = [
        (p.stream_index, p.pts * p.time_base, p.time_base, bytes(p), p.is_keyframe)
        for p in source.demux()
        if p.pts is not None and p.time_base is not None
    ]
    path.unlink()
    return packets, list(source.streams)


def write_numbered(path: Path, duration_s: int, *, video_codec: str = "libx264") -> Path:
    """A film whose picture shows its own number, in binary, and whose tone rises by 100 Hz a second from 300 Hz."""
    with av.open(str(path), "w") as out:
        picture = out.add_stream(video_codec, rate=NUMBER_RATE_HZ)
        picture.width, picture.height, picture.pix_fmt = (
            NUMBER_BITS * NUMBER_BLOCK_PX // 2,
            2 * NUMBER_BLOCK_PX,
            "yuv420p",
        )
        picture.codec_context.gop_size = NUMBER_RATE_HZ
        if video_codec == "libx264":
            picture.codec_context.options = {"preset": "ultrafast", "crf": "10", "bf": "2"}
        sound = out.add_stream("aac", rate=16_000, layout="mono", bit_rate=48_000)
        packets = []
        for number in range(duration_s * NUMBER_RATE_HZ):
            frame = av.VideoFrame.from_ndarray(_numbered_picture(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, NUMBER_RATE_HZ)
            packets += picture.encode(frame)
        wave = _steps(float(duration_s), 16_000, lambda t: 300 + 100 * np.floor(t))
        block = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
        block.sample_rate, block.pts = 16_000, 0
        packets += [*picture.encode(None), *sound.encode(block), *sound.encode(None)]
        for packet in sorted(packets, key=lambda p: float((p.dts or 0) * (p.time_base or 0))):
            out.mux(packet)
    return path


def _numbered_picture(number: int) -> np.ndarray:
    bits = [255 * (number >> bit & 1) for bit in range(NUMBER_BITS)]
    blocks = np.array(bits, np.uint8).reshape(2, NUMBER_BITS // 2)
    noise = np.random.default_rng(number).integers(0, 40, (2 * NUMBER_BLOCK_PX, NUMBER_BITS // 2 * NUMBER_BLOCK_PX))
    grey = np.clip(np.kron(blocks, np.ones((NUMBER_BLOCK_PX, NUMBER_BLOCK_PX))) * 0.7 + 20 + noise, 0, 255)
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def number_of(picture: np.ndarray) -> int:
    """The number that a numbered picture shows, at any size of it."""
    grey = picture.astype(float).mean(axis=2)
    rows = [half[half.shape[0] // 4 : -half.shape[0] // 4] for half in np.array_split(grey, 2, axis=0)]
    blocks = [
        block[:, block.shape[1] // 4 : -block.shape[1] // 4].mean()
        for row in rows
        for block in np.array_split(row, NUMBER_BITS // 2, axis=1)
    ]
    return sum(int(level > 128) << bit for bit, level in enumerate(blocks))


def _steps(duration_s: float, rate_hz: int, frequency_hz: Callable[[np.ndarray], np.ndarray | float]) -> np.ndarray:
    """float32 [S]: a tone of a frequency that changes with time, without clicks."""
    times = np.arange(round(duration_s * rate_hz)) / rate_hz
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(frequency_hz(times), times.shape)) / rate_hz
    return (0.4 * np.sin(phase)).astype(np.float32)


def frequency_of(wave: np.ndarray, rate_hz: int) -> float:
    """The strongest frequency, Hz."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(np.argmax(spectrum)) * rate_hz / len(wave)


def compressed_header_bomb(num_bytes: int) -> bytes:
    """A QuickTime file whose `moov` is deflated (`cmov`), and grows to `num_bytes` of zeros."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(num_bytes >> 20)) + packer.flush()
    deflated = _box(b"dcom", b"zlib") + _box(b"cmvd", struct.pack(">I", num_bytes) + packed)
    return _box(b"ftyp", b"qt  \0\0\0\0qt  ") + _box(b"moov", _box(b"cmov", deflated))


def _box(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", 8 + len(payload)) + name + payload


def huge_h264(source: Path, target: Path, width: int, height: int) -> Path:
    """Copy an H.264 baseline film with parameter sets that declare another size, a multiple of 16."""
    with av.open(str(source)) as reading, av.open(str(target), "w") as out:
        copies = {stream.index: out.add_stream_from_template(stream) for stream in reading.streams}
        picture = reading.streams.video[0]
        extradata = picture.codec_context.extradata or b""
        size = int.from_bytes(extradata[6:8], "big")
        sps = _resized_sps(extradata[8 : 8 + size], width // 16, height // 16)
        changed = extradata[:6] + struct.pack(">H", len(sps)) + sps + extradata[8 + size :]
        copies[picture.index].codec_context.extradata = changed
        for packet in reading.demux():
            if packet.dts is not None:
                packet.stream = copies[packet.stream_index]
                out.mux(packet)
    return target


def _resized_sps(sps: bytes, width_blocks: int, height_blocks: int) -> bytes:
    """An H.264 sequence parameter set (7.3.2.1.1) of profile 66 for another number of macroblocks."""
    bits = "".join(f"{byte:08b}" for byte in sps.replace(b"\0\0\3", b"\0\0"))
    assert sps[1] == 66
    position = 32
    # seq_parameter_set_id, log2_max_frame_num, pic_order_cnt_type.
    _, position = _read_ue(bits, position)
    _, position = _read_ue(bits, position)
    order, position = _read_ue(bits, position)
    if order == 0:
        _, position = _read_ue(bits, position)
    assert order != 1
    # max_num_ref_frames, and one bit for gaps.
    _, position = _read_ue(bits, position)
    position += 1
    _, after = _read_ue(bits, position)
    _, after = _read_ue(bits, after)
    tail = bits[after:].rstrip("0")[:-1]
    changed = bits[:position] + _ue(width_blocks - 1) + _ue(height_blocks - 1) + tail + "1"
    changed += "0" * (-len(changed) % 8)
    content = bytes(int(changed[i : i + 8], 2) for i in range(0, len(changed), 8))
    return content.replace(b"\0\0\1", b"\0\0\3\1").replace(b"\0\0\0", b"\0\0\3\0")


def _read_ue(bits: str, position: int) -> tuple[int, int]:
    zeros = bits.index("1", position) - position
    end = position + 2 * zeros + 1
    return int(bits[position + zeros : end], 2) - 1, end


def _ue(value: int) -> str:
    digits = f"{value + 1:b}"
    return "0" * (len(digits) - 1) + digits


def resized_vp8(source: Path, target: Path, width: int, height: int) -> Path:
    """Copy a VP8 film with key frames (RFC 6386, 9.1) that declare another size, at most 16383 x 16383."""
    content = bytearray(source.read_bytes())
    start = content.find(b"\x9d\x01\x2a")
    found = 0
    while start >= 0:
        content[start + 3 : start + 7] = struct.pack("<HH", width, height)
        found += 1
        start = content.find(b"\x9d\x01\x2a", start + 7)
    assert found
    target.write_bytes(bytes(content))
    return target


def overwrite(path: Path, shares: Sequence[float], num_bytes: int, seed: int = 0) -> Path:
    """Noise over `num_bytes` bytes at some places, given as shares of the file."""
    content = bytearray(path.read_bytes())
    for share in shares:
        start = int(len(content) * share)
        content[start : start + num_bytes] = np.random.default_rng(seed).bytes(num_bytes)
    path.write_bytes(bytes(content))
    return path
