import io
import wave as wave_file
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.data.demo_world import FRAME_RATE_HZ, SAMPLE_RATE_HZ, render_clip
from pipelines.data.media_write import decode_flac, encode_flac, mux_with_copied_video, wav_bytes, write_mp4
from pipelines.errors import InputError, MediaError
from pipelines.evaluation.detector import detect, match


def sound_by_time_stamps(source: str | io.BytesIO, rate_hz: int, num_samples: int) -> np.ndarray:
    """What a reader hears that goes by presentation time stamps alone."""
    sound = np.zeros(num_samples + rate_hz, np.float32)
    with av.open(source) as container:
        for frame in container.decode(audio=0):
            first = round(frame.pts * frame.time_base * rate_hz)
            samples = frame.to_ndarray().mean(axis=0)
            assert first >= 0
            sound[first : first + len(samples)] = samples[: len(sound) - first]
    return sound[:num_samples]


def packets_of(source: Path) -> list[tuple[bytes, Fraction, Fraction]]:
    """Payload, presentation and decoding time of each packet of the picture."""
    with av.open(str(source)) as container:
        video = container.streams.video[0]
        return [(bytes(p), p.pts * p.time_base, p.dts * p.time_base) for p in container.demux(video) if p.size]


def durations_s(source: Path | io.BytesIO) -> tuple[float, float]:
    with av.open(str(source) if isinstance(source, Path) else source) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        return float(picture.duration * picture.time_base), float(sound.duration * sound.time_base)


def moving_square(num_frames: int, shape: tuple[int, int] = (48, 64)) -> np.ndarray:
    frames = np.full((num_frames, *shape, 3), 30, np.uint8)
    for i in range(num_frames):
        frames[i, 10:20, i % 50 : i % 50 + 10] = 220
    return frames


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
def tone() -> np.ndarray:
    """One second of noise bursts at 16 kHz."""
    wave = np.zeros(32_000, np.float32)
    wave[8_000:10_000] = 0.3 * np.random.default_rng(0).standard_normal(2_000)
    return wave


def test_sound_and_picture_of_an_mp4_lie_where_the_events_are() -> None:
    for index in range(8):
        clip = render_clip(21, index)
        file = io.BytesIO()
        write_mp4(file, clip.frames, FRAME_RATE_HZ, clip.wave, SAMPLE_RATE_HZ)
        file.seek(0)
        heard = sound_by_time_stamps(file, SAMPLE_RATE_HZ, 40_000)
        before, after = detect(clip.wave, SAMPLE_RATE_HZ), detect(heard, SAMPLE_RATE_HZ)
        counts = match(after, clip.events)
        assert counts.num_class_matched == counts.num_events == counts.num_detected
        assert max(abs(a.time_s - b.time_s) for a, b in zip(before, after, strict=True)) <= 0.0101
        # To the sample, not to the detector's hop.
        lags = [float(heard[lag : lag + 39_000] @ clip.wave[:39_000]) for lag in range(200)]
        assert int(np.argmax(lags)) <= 8
        file.seek(0)
        with av.open(file) as container:
            for i, frame in enumerate(container.decode(video=0)):
                assert frame.time == i / FRAME_RATE_HZ
                error = frame.to_ndarray(format="rgb24").astype(float) - clip.frames[i]
                assert np.sqrt((error**2).mean()) < 12


def test_an_mp4_lasts_exactly_as_long_as_its_clip_and_its_bytes_are_always_the_same() -> None:
    clip = render_clip(21, 0)
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        write_mp4(file, clip.frames, FRAME_RATE_HZ, clip.wave, SAMPLE_RATE_HZ)
    assert files[0].getvalue() == files[1].getvalue()
    files[0].seek(0)
    assert durations_s(files[0]) == (2.5, 2.5)
    files[1].seek(0)
    with av.open(files[1]) as container:
        assert container.duration == 2_500_000
        assert container.start_time == 0
        assert [s.codec_context.name for s in container.streams] == ["h264", "aac"]


def test_frames_at_a_broken_rate_keep_their_times(tmp_path: Path) -> None:
    rate_hz = Fraction(30_000, 1001)
    write_mp4(tmp_path / "a.mp4", moving_square(30), rate_hz, np.zeros(16_016, np.float32), 16_000)
    with av.open(str(tmp_path / "a.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([float(i / rate_hz) for i in range(30)], abs=1e-4)


@pytest.mark.parametrize(
    ("frames", "wave", "rate_hz", "word"),
    [
        (np.zeros((3, 48, 64), np.uint8), np.zeros(100, np.float32), 16_000, r"\[T, H, W, 3\]"),
        (np.zeros((3, 48, 64, 3), np.float32), np.zeros(100, np.float32), 16_000, "uint8"),
        (np.zeros((3, 47, 64, 3), np.uint8), np.zeros(100, np.float32), 16_000, "even"),
        (np.zeros((3, 48, 64, 3), np.uint8), np.zeros((2, 100), np.float32), 16_000, r"\[S\]"),
        (np.zeros((3, 48, 64, 3), np.uint8), np.full(100, np.nan, np.float32), 16_000, "finite"),
        (np.zeros((3, 48, 64, 3), np.uint8), np.zeros(100, np.float32), 17_000, "17000"),
    ],
)
def test_what_cannot_be_written_is_named(frames: np.ndarray, wave: np.ndarray, rate_hz: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        write_mp4(io.BytesIO(), frames, 16, wave, rate_hz)


@pytest.mark.parametrize(("codec", "shift"), [("libx264", 0), ("libx264", -10), ("libx264", 7), ("libx265", 0)])
def test_a_copied_picture_is_bit_exact_and_stays_in_its_place(
    tmp_path: Path, codec: str, shift: int, tone: np.ndarray
) -> None:
    source, result = tmp_path / "-a b é.mp4", tmp_path / "out.mp4"
    write_source(source, codec=codec, shift=shift)
    mux_with_copied_video(source, tone, 16_000, result)
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


@pytest.mark.parametrize("num_samples", [1_000, 32_000, 90_000])
def test_the_sound_is_cut_or_filled_to_the_end_of_the_picture(tmp_path: Path, num_samples: int) -> None:
    source, result = tmp_path / "in.mp4", tmp_path / "out.mp4"
    write_source(source)
    mux_with_copied_video(source, np.full(num_samples, 0.1, np.float32), 16_000, result)
    picture_s, sound_s = durations_s(result)
    assert picture_s == 2.0
    assert sound_s == pytest.approx(picture_s, abs=1024 / 16_000)


def test_a_source_that_cannot_take_a_sound_is_named_and_leaves_nothing(tmp_path: Path, tone: np.ndarray) -> None:
    text, silent = tmp_path / "notes.mp4", tmp_path / "sound.wav"
    text.write_text("not a video " * 50)
    silent.write_bytes(wav_bytes(tone, 16_000))
    for source in (text, silent):
        with pytest.raises(InputError, match=source.name):
            mux_with_copied_video(source, tone, 16_000, tmp_path / "out.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.mp4", "sound.wav"]


def test_a_failed_write_leaves_the_old_result(tmp_path: Path) -> None:
    source, result = tmp_path / "in.mp4", tmp_path / "out.mp4"
    write_source(source)
    result.write_bytes(b"old")
    with pytest.raises(ValueError, match="finite"):
        mux_with_copied_video(source, np.full(32_000, np.inf, np.float32), 16_000, result)
    assert result.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
@pytest.mark.parametrize("num_samples", [1, 1000, 40_000])
def test_flac_keeps_every_16_bit_sample_and_the_length(num_samples: int, rate_hz: int) -> None:
    samples = np.random.default_rng(num_samples).integers(-32768, 32768, num_samples).astype(np.float32) / 32768
    assert np.array_equal(decode_flac(encode_flac(samples, rate_hz)), samples)


def test_flac_and_wav_round_to_the_nearest_16_bit_sample_and_clip() -> None:
    wave = np.array([0.25 + 0.4 / 32768, -2.0, 2.0, 0.0], np.float32)
    expected = np.array([0.25, -1.0, 32767 / 32768, 0.0], np.float32)
    assert np.array_equal(decode_flac(encode_flac(wave, 16_000)), expected)
    with wave_file.open(io.BytesIO(wav_bytes(wave, 16_000))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth(), file.getnframes()) == (16_000, 1, 2, 4)
        assert np.array_equal(np.frombuffer(file.readframes(4), "<i2") / np.float32(32768), expected)


def test_what_is_not_sound_is_refused() -> None:
    for make in (encode_flac, wav_bytes):
        with pytest.raises(ValueError, match="finite"):
            make(np.array([0.0, np.nan], np.float32), 16_000)
        with pytest.raises(ValueError, match="empty"):
            make(np.zeros(0, np.float32), 16_000)


def test_a_damaged_flac_is_refused_and_never_shorter_than_it_was() -> None:
    whole = encode_flac(0.5 * np.sin(np.arange(40_000, dtype=np.float32) / 9), 16_000)
    for content in (b"", b"RIFF and more", whole[: len(whole) // 2], whole[:60]):
        with pytest.raises(MediaError):
            decode_flac(content)
