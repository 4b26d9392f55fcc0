import io
import wave as wave_file
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.data.demo_world import FRAME_RATE_HZ, SAMPLE_RATE_HZ, render_clip
from pipelines.data.media_write import decode_flac, encode_flac, wav_bytes, write_mp4
from pipelines.errors import MediaError
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


def durations_s(source: io.BytesIO) -> tuple[float, float]:
    with av.open(source) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        return float(picture.duration * picture.time_base), float(sound.duration * sound.time_base)


def moving_square(num_frames: int, shape: tuple[int, int] = (48, 64)) -> np.ndarray:
    frames = np.full((num_frames, *shape, 3), 30, np.uint8)
    for i in range(num_frames):
        frames[i, 10:20, i % 50 : i % 50 + 10] = 220
    return frames


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
