"""Sound in blocks becomes a file as long as the picture, in step with whoever makes the blocks; or nothing is left."""

import io
import shutil
import tracemalloc
import wave as wave_file
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.data.media_stream import mux_with_copied_video, picture_duration_s, write_sound
from pipelines.data.media_write import decode_flac, encode_flac, wav_bytes
from pipelines.errors import EnvironmentFailed, InputError
from tests.pipelines.clip_factory import grey_frames, tone, write_clip
from tests.pipelines.test_media_write import moving_square, sound_by_time_stamps


def packets_of(source: Path) -> list[tuple[bytes, Fraction, Fraction]]:
    """Payload, presentation and decoding time of each packet of the picture."""
    with av.open(str(source)) as container:
        video = container.streams.video[0]
        return [(bytes(p), p.pts * p.time_base, p.dts * p.time_base) for p in container.demux(video) if p.size]


def picture_times_s(source: Path) -> list[float]:
    with av.open(str(source)) as container:
        return [frame.time for frame in container.decode(video=0) if frame.time is not None]


def durations_s(source: Path) -> tuple[float, float]:
    with av.open(str(source)) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        return float(picture.duration * picture.time_base), float(sound.duration * sound.time_base)


def in_blocks(wave: np.ndarray, size: int = 3_001) -> Iterator[np.ndarray]:
    for first in range(0, len(wave), size):
        yield wave[first : first + size]


def write_source(path: Path, *, codec: str = "libx264", shift: int = 0, rate_hz: int = 25) -> None:
    """A video with B-frames, whose picture starts `shift` frames after the sound (before it: an edit list)."""
    with av.open(str(path), "w", format="mp4") as out:
        options = {"bf": "2", "g": "12"} if codec == "libx264" else {"x265-params": "log-level=error"}
        video = out.add_stream(codec, rate=rate_hz, options=options)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        if codec == "libx265":
            video.codec_context.codec_tag = "hvc1"
        sound = out.add_stream("aac", rate=44_100, layout="stereo")
        frames = [av.VideoFrame.from_ndarray(f, format="rgb24") for f in moving_square(50)]
        for i, frame in enumerate([*frames, None]):
            if frame is not None:
                frame.pts, frame.time_base = i, Fraction(1, rate_hz)
            for packet in video.encode(frame):
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                out.mux(packet)
        noise = av.AudioFrame.from_ndarray(np.zeros((2, 88_200), np.float32), format="fltp", layout="stereo")
        noise.sample_rate, noise.pts = 44_100, 0
        out.mux([*sound.encode(noise), *sound.encode(None)])


@pytest.fixture(scope="module")
def bursts() -> np.ndarray:
    """One second of noise bursts at 16 kHz."""
    wave = np.zeros(32_000, np.float32)
    wave[8_000:10_000] = 0.3 * np.random.default_rng(0).standard_normal(2_000)
    return wave


@pytest.mark.parametrize(("codec", "shift"), [("libx264", 0), ("libx264", -10), ("libx264", 7), ("libx265", 0)])
def test_a_copied_picture_is_bit_exact_and_stays_in_its_place(
    tmp_path: Path, codec: str, shift: int, bursts: np.ndarray
) -> None:
    source, result = tmp_path / "-a b é.mp4", tmp_path / "out.mp4"
    write_source(source, codec=codec, shift=shift)
    mux_with_copied_video(source, in_blocks(bursts), 16_000, result)
    assert packets_of(result) == packets_of(source)
    with av.open(str(source)) as a, av.open(str(result)) as b:
        first, second = a.streams.video[0], b.streams.video[0]
        assert second.codec_context.extradata == first.codec_context.extradata
        assert second.codec_context.codec_tag == first.codec_context.codec_tag
        assert [s.type for s in b.streams] == ["video", "audio"]
        shown = [frame.time for frame in a.decode(video=0)]
        assert [frame.time for frame in b.decode(video=0)] == pytest.approx(shown, abs=1e-4)
    heard = sound_by_time_stamps(str(result), 16_000, 32_000)
    assert (heard[8_000:10_000] ** 2).sum() > 0.95 * (heard**2).sum()


def test_a_source_that_cannot_take_a_sound_is_named_and_leaves_nothing(tmp_path: Path, bursts: np.ndarray) -> None:
    text, silent = tmp_path / "notes.mp4", tmp_path / "sound.wav"
    text.write_text("not a video " * 50)
    silent.write_bytes(wav_bytes(bursts, 16_000))
    for source in (text, silent):
        with pytest.raises(InputError, match=source.name):
            mux_with_copied_video(source, [bursts], 16_000, tmp_path / "out.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.mp4", "sound.wav"]


def test_a_failed_write_leaves_the_old_result(tmp_path: Path) -> None:
    source, result = tmp_path / "in.mp4", tmp_path / "out.mp4"
    write_source(source)
    result.write_bytes(b"old")
    with pytest.raises(ValueError, match="finite"):
        mux_with_copied_video(source, [np.full(32_000, np.inf, np.float32)], 16_000, result)
    assert result.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def write_any(source: Path, blocks: Iterator[np.ndarray], result: Path) -> None:
    if result.suffix == ".mp4":
        mux_with_copied_video(source, blocks, 16_000, result)
    else:
        write_sound(blocks, 16_000, result)


FILM, BROADCAST = Fraction(24_000, 1001), Fraction(30_000, 1001)


def write_at_rate(path: Path, rate_hz: Fraction, seconds: float) -> Path:
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=rate_hz, options={"preset": "ultrafast", "bf": "2"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for i, pixels in enumerate(moving_square(round(seconds * rate_hz))):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate_hz
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("rate_hz", [FILM, BROADCAST, Fraction(30), "variable"], ids=str)
@pytest.mark.parametrize("sample_rate_hz", [16_000, 44_100])
def test_the_sound_is_as_long_as_the_picture_at_every_frame_rate(
    tmp_path: Path, suffix: str, rate_hz: Fraction | str, sample_rate_hz: int
) -> None:
    source, result = tmp_path / f"in{suffix}", tmp_path / "out.mp4"
    if isinstance(rate_hz, Fraction):
        write_at_rate(source, rate_hz, 3.3)
    else:
        times_s = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, 40)).tolist()
        write_clip(source, grey_frames(range(40, 240, 5)), tone(4.0, 48_000), frame_times_s=[0.0, *times_s[:-1]])
    length_s = picture_duration_s(source)
    wave = np.full(round(length_s * sample_rate_hz), 0.1, np.float32)
    mux_with_copied_video(source, in_blocks(wave), sample_rate_hz, result)
    picture_s, sound_s = durations_s(result)
    one_audio_frame_s = 1024 / sample_rate_hz
    assert picture_s == pytest.approx(length_s, abs=0.002)
    assert sound_s == pytest.approx(picture_s, abs=one_audio_frame_s)
    assert picture_times_s(result) == pytest.approx(picture_times_s(source), abs=0.0011)
    with av.open(str(source)) as container:
        *_, last = container.decode(video=0)
    # The last picture is shown for a while too.
    assert last.time < length_s < last.time + 0.25
    if isinstance(rate_hz, Fraction):
        assert length_s == pytest.approx(float(round(3.3 * rate_hz) / rate_hz), abs=0.002)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_a_picture_of_a_few_frames_keeps_them_all(tmp_path: Path, num_frames: int) -> None:
    """In Matroska, FFmpeg never gets to know the decoding times of so short a picture."""
    source = write_at_rate(tmp_path / "in.mkv", Fraction(25), num_frames / 25)
    mux_with_copied_video(source, [np.zeros(640 * num_frames, np.float32)], 16_000, tmp_path / "out.mp4")
    assert picture_times_s(tmp_path / "out.mp4") == pytest.approx(picture_times_s(source), abs=0.0011)
    assert len(picture_times_s(source)) == num_frames


def test_blocks_of_any_size_give_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "in.mp4"
    write_source(source)
    wave = (0.3 * np.random.default_rng(0).standard_normal(32_000)).astype(np.float32)
    for name, blocks in (("whole", [wave]), ("odd", in_blocks(wave, 777)), ("long", in_blocks(wave, 20_000))):
        copies = list(blocks)
        mux_with_copied_video(source, copies, 16_000, tmp_path / f"{name}.mp4")
        write_sound(copies, 16_000, tmp_path / f"{name}.flac")
        write_sound(copies, 16_000, tmp_path / f"{name}.wav")
    for suffix in ("mp4", "flac", "wav"):
        assert len({(tmp_path / f"{name}.{suffix}").read_bytes() for name in ("whole", "odd", "long")}) == 1
    assert (tmp_path / "odd.wav").read_bytes() == wav_bytes(wave, 16_000)
    assert np.array_equal(decode_flac((tmp_path / "odd.flac").read_bytes()), decode_flac(encode_flac(wave, 16_000)))


def test_a_block_is_asked_for_only_when_the_picture_has_come_so_far(tmp_path: Path) -> None:
    """So that the whole picture is never in memory, nor the sound."""
    source, result = write_at_rate(tmp_path / "in.mp4", Fraction(25), 60.0), tmp_path / "out.mp4"
    written = []

    def blocks() -> Iterator[np.ndarray]:
        noise = (0.3 * np.random.default_rng(0).standard_normal(44_100)).astype(np.float32)
        for _ in range(60):
            written.append((tmp_path / "out.mp4.part").stat().st_size)
            yield noise

    mux_with_copied_video(source, blocks(), 44_100, result)
    # FFmpeg writes pieces of 256 KiB.
    expected = np.arange(60) / 60 * result.stat().st_size
    assert np.abs(np.array(written) - expected).max() < 2**18 + 0.05 * result.stat().st_size
    assert len(set(written)) > 3


@pytest.mark.parametrize("name", ["out.mp4", "out.flac", "out.wav"])
def test_memory_does_not_grow_with_the_length(tmp_path: Path, name: str) -> None:
    """Ten seconds against a hundred, of what Python holds; FFmpeg's own share is in the test of whole processes."""
    peaks = []
    for seconds in (10, 100):
        source = write_clip(tmp_path / f"{seconds}.mp4", grey_frames([99] * (4 * seconds)), None, frame_rate=4)
        blocks = (np.full(16_000, 0.1, np.float32) for _ in range(seconds))
        tracemalloc.start()
        write_any(source, blocks, tmp_path / name)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 50_000
    assert peaks[1] < 16_000 * 4 * 20


def test_a_picture_that_mp4_does_not_hold_is_told_before_any_sound_is_made(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.avi", grey_frames([50] * 25), None, video_codec="mpeg4")
    mux_with_copied_video(source, [np.zeros(16_000, np.float32)], 16_000, tmp_path / "out.mp4")
    (tmp_path / "out.mp4").unlink()
    source = write_clip(tmp_path / "in.webm", grey_frames([50] * 25), None, video_codec="libvpx")

    def blocks() -> Iterator[np.ndarray]:
        pytest.fail("sound was asked for")
        yield

    with pytest.raises(InputError, match=r"does not support 'vp8' codec; .* take the sound alone"):
        mux_with_copied_video(source, blocks(), 16_000, tmp_path / "out.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.avi", "in.webm"]


@pytest.mark.parametrize("name", ["out.mp4", "out.flac", "out.wav"])
def test_storage_that_goes_away_is_a_failure_of_the_environment(tmp_path: Path, name: str) -> None:
    source, folder = tmp_path / "in.mp4", tmp_path / "mount"
    write_source(source)
    folder.mkdir()

    def blocks() -> Iterator[np.ndarray]:
        yield np.zeros(16_000, np.float32)
        shutil.rmtree(folder)
        yield np.zeros(16_000, np.float32)

    with pytest.raises(EnvironmentFailed, match=f"cannot write {folder / name}"):
        write_any(source, blocks(), folder / name)


def test_an_error_of_whoever_makes_the_sound_comes_through_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in.mp4"
    write_source(source)

    def blocks() -> Iterator[np.ndarray]:
        yield np.zeros(16_000, np.float32)
        raise InputError("no more sound")

    for name in ("out.mp4", "out.wav", "out.flac"):
        with pytest.raises(InputError, match=r"^no more sound$"):
            write_any(source, blocks(), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["in.mp4"]


def test_a_long_wav_is_one_that_other_readers_understand(tmp_path: Path) -> None:
    wave = np.linspace(-0.9, 0.9, 50_000, dtype=np.float32)
    write_sound(in_blocks(wave), 16_000, tmp_path / "a.wav")
    with wave_file.open(io.BytesIO((tmp_path / "a.wav").read_bytes())) as file:
        assert (file.getnframes(), file.getframerate(), file.getnchannels()) == (50_000, 16_000, 1)
    with pytest.raises(ValueError, match="must end in"):
        write_sound([wave], 16_000, tmp_path / "a.mp3")
