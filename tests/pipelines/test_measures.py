"""Measures have known answers: standard tones, constructed pictures, cuts at known times."""

import math

import numpy as np
import pytest

from pipelines.data.demo_world import FRAME_RATE_HZ, SAMPLE_RATE_HZ, render_clip
from pipelines.data.measured import MEASURED
from pipelines.data.measures import CutFinder, SourceFormat, loudness_lufs, measure_clip, measure_picture, measure_sound


def tone(level_db: float, rate_hz: int, seconds: float = 4.0, frequency_hz: float = 997.0) -> np.ndarray:
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    return (10 ** (level_db / 20) * np.sin(2 * np.pi * frequency_hz * times)).astype(np.float32)


def still(num_frames: int = 40, size_px: int = 64, seed: int = 0) -> np.ndarray:
    picture = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.repeat(np.kron(picture, np.ones((size_px // 8, size_px // 8, 1), np.uint8))[None], num_frames, 0)


@pytest.mark.parametrize("rate_hz", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("level_db", [-20.0, -33.0])
def test_a_sine_has_the_loudness_that_the_standard_gives_it(rate_hz: int, level_db: float) -> None:
    # BS.1770: a 997 Hz sine of full scale in one channel reads -3.01; EBU Tech 3341 allows 0.1 LU.
    assert loudness_lufs(tone(level_db, rate_hz).astype(np.float64), rate_hz) == pytest.approx(level_db - 3.01, abs=0.1)


def test_a_tone_of_minus_23_lufs_reads_minus_23_whatever_silence_is_around_it() -> None:
    loud = tone(-19.99, 16_000)
    padded = np.concatenate([loud, np.zeros(5 * 16_000, np.float32)])
    assert measure_sound(loud, 16_000)["loudness_lufs"] == pytest.approx(-23.0, abs=0.1)
    # The gate leaves the silence out; two blocks at the edge are partly silent.
    assert measure_sound(padded, 16_000)["loudness_lufs"] == pytest.approx(-23.0, abs=0.2)


def test_silence_and_sound_shorter_than_a_block_have_no_loudness_and_no_level_instead_of_minus_infinity() -> None:
    silence = measure_sound(np.zeros(16_000, np.float32), 16_000)
    assert silence["loudness_lufs"] is None
    assert silence["rms_db"] is None
    assert silence["silent_share"] == 1.0
    assert silence["peak"] == 0.0
    assert measure_sound(tone(-20, 16_000, 0.39), 16_000)["loudness_lufs"] is None
    assert measure_sound(tone(-90, 16_000), 16_000)["loudness_lufs"] is None


def test_level_offset_and_clipping_are_what_was_put_in() -> None:
    wave = tone(-6, 16_000, 1.0, 1000.0)
    measured = measure_sound(wave + np.float32(0.25), 16_000)
    assert measured["dc_offset"] == pytest.approx(0.25, abs=1e-6)
    assert measured["peak"] == pytest.approx(0.25 + 10 ** (-6 / 20), abs=1e-4)
    assert measure_sound(wave, 16_000)["rms_db"] == pytest.approx(-6 - 3.0103, abs=1e-3)
    clipped = wave.copy()
    clipped[:1600:2], clipped[1:1600:2] = 1.0, -1.0
    assert measure_sound(clipped, 16_000)["clipped_share"] == pytest.approx(0.1)
    assert measure_sound(wave, 16_000)["clipped_share"] == 0.0


@pytest.mark.parametrize(("silent_blocks", "rest"), [(0, 0), (5, 0), (19, 0), (5, 123)])
def test_the_silent_share_counts_blocks_of_50_ms_the_last_one_short(silent_blocks: int, rest: int) -> None:
    wave = tone(-20, 16_000, 20 * 0.05 + rest / 16_000)
    wave[: silent_blocks * 800] = 1e-4
    assert measure_sound(wave, 16_000)["silent_share"] == pytest.approx(silent_blocks / (20 + bool(rest)))


def test_a_static_picture_is_static_through_compression_noise_and_a_small_moving_thing_is_not() -> None:
    rng = np.random.default_rng(1)
    noisy = np.clip(still() + rng.integers(-2, 3, (40, 64, 64, 3)), 0, 255).astype(np.uint8)
    measured = measure_picture(noisy, 16)
    assert measured["static_share"] == 1.0
    assert 0 < measured["motion"] < 3
    assert measure_picture(still(), 16)["motion"] == 0.0
    moving = still()
    for index in range(20, 40):
        moving[index, 30:34, index : index + 4] = 255 - moving[index, 30:34, index : index + 4]
    assert measure_picture(moving, 16)["static_share"] == pytest.approx(19 / 39)


def test_motion_and_brightness_are_in_steps_of_255() -> None:
    frames = np.zeros((9, 64, 64, 3), np.uint8)
    frames[1::2] = 10
    measured = measure_picture(frames, 16)
    assert measured["motion"] == pytest.approx(10.0)
    assert measured["brightness"] == pytest.approx(40 / 9)


@pytest.mark.parametrize("at", [3, 7, 25, 37])
@pytest.mark.parametrize("size_px", [64, 224])
def test_a_hard_cut_is_found_where_it_is(at: int, size_px: int) -> None:
    frames = np.concatenate([still(at, size_px, seed=1), still(40 - at, size_px, seed=2)])
    measured = measure_picture(frames, 16)
    assert measured["cuts_s"] == [at / 16]
    assert measured["num_cuts"] == 1


def test_cuts_in_pieces_are_the_cuts_of_the_whole() -> None:
    frames = list(np.concatenate([still(10, seed=1), still(15, seed=2), still(5, seed=3)]))
    whole = CutFinder(8).push(frames)
    finder = CutFinder(8)
    # A piece that begins with a cut, a piece of nothing, and one frame alone.
    pieces = [finder.push(frames[a:b]) for a, b in ((0, 10), (10, 10), (10, 11), (11, 30))]
    assert whole == [10, 25]
    assert [index for piece in pieces for index in piece] == whole


def test_a_pan_however_fast_is_no_cut() -> None:
    wide = np.random.default_rng(4).integers(0, 256, (8, 100, 3), np.uint8)
    picture = np.kron(wide, np.ones((8, 8, 1), np.uint8))
    pan = np.stack([picture[:, 8 * k : 8 * k + 64] for k in range(40)])
    measured = measure_picture(pan, 16)
    assert measured["motion"] > 40
    assert measured["cuts_s"] == []


def test_clips_of_the_demo_world_have_no_cuts_and_every_named_measure() -> None:
    for index in range(12):
        clip = render_clip(0, index)
        measured = measure_clip(clip.wave, SAMPLE_RATE_HZ, clip.frames, FRAME_RATE_HZ)
        assert list(measured) == [name for name, _, _ in MEASURED]
        assert measured["num_cuts"] == 0
        assert not measured["clipped_share"]
        assert measured["source_width"] is None
        assert all(math.isfinite(v) for v in measured.values() if isinstance(v, float))


def test_measures_are_a_function_of_the_clip_alone() -> None:
    clip = render_clip(3, 1)
    source = SourceFormat(width=640, height=360, fps=29.97, rate_hz=48_000, channels=2)
    first = measure_clip(clip.wave, SAMPLE_RATE_HZ, clip.frames, FRAME_RATE_HZ, source)
    measure_clip(-clip.wave[::-1], SAMPLE_RATE_HZ, clip.frames[::-1], FRAME_RATE_HZ)
    assert measure_clip(clip.wave.copy(), SAMPLE_RATE_HZ, clip.frames.copy(), FRAME_RATE_HZ, source) == first
    assert first["source_channels"] == 2
