"""From decoded sound to the clip's wave."""

import numpy as np
import pytest

from pipelines.data.media_write import decode_flac, encode_flac
from pipelines.data.sound import resample, wave_of
from pipelines.data.window import DecodedWindow
from pipelines.errors import MediaError
from tests.pipelines.clip_factory import tone


def window(audio: np.ndarray | None, rate_hz: int = 16_000, margin: int = 0) -> DecodedWindow:
    return DecodedWindow(frames=(), audio=audio, audio_rate_hz=rate_hz, audio_margin=margin, valid_s=2.5)


@pytest.mark.parametrize("rate_hz", [8000, 44_100, 48_000, 192_000])
def test_a_tone_keeps_its_pitch_place_and_loudness_and_the_length_is_exact(rate_hz: int) -> None:
    margin = {8000: 400, 44_100: 2205, 48_000: 2400, 192_000: 9600}[rate_hz]
    audio = tone(2.6, rate_hz, 440.0)[0]
    wave = wave_of(window(audio, rate_hz, margin), 16_000, 40_000)
    assert wave.shape == (40_000,)
    times = np.arange(40_000) / 16_000 + 0.05
    # The margin holds real sound, so that there is no edge at the start of the window.
    np.testing.assert_allclose(wave[:-800], 0.5 * np.sin(2 * np.pi * 440 * times)[:-800], atol=1e-3)


def test_frequencies_above_half_the_rate_vanish() -> None:
    assert np.abs(resample(tone(1.0, 48_000, 11_000.0)[0], 48_000, 16_000)[500:-500]).max() < 1e-3


def test_the_stored_flac_is_the_wave_itself() -> None:
    wave = wave_of(window(tone(2.5, 16_000, 440.0, 1.002)[0]), 16_000, 40_000)
    np.testing.assert_array_equal(decode_flac(encode_flac(wave, 16_000)), wave)


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (np.zeros(40_000, np.float32), "silent"),
        (np.full(40_000, 0.3, np.float32), "silent"),
        (tone(2.5, 16_000, 440.0, 2e-5)[0], "silent"),
        (np.clip(tone(2.5, 16_000, 440.0, 9.0)[0], -1, 1), "clipped"),
        (None, "no_audio"),
    ],
)
def test_sound_that_teaches_nothing_is_rejected(audio: np.ndarray | None, reason: str) -> None:
    with pytest.raises(MediaError) as caught:
        wave_of(window(audio), 16_000, 40_000)
    assert caught.value.reason == reason
