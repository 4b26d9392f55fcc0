"""From decoded sound to the clip's wave: resampled, cut to the exact length, 16 bit, and fit to be learnt from."""

from functools import lru_cache

import numpy as np
import torch
import torchaudio.transforms

from pipelines.data.window import DecodedWindow
from pipelines.errors import MediaError

KAISER = {
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 14.769656459379492,
}
"""The resampler of the public features (MMAudio, arXiv 2412.15322)."""
SILENCE = 1e-4
"""Peak, without the constant part, under which a sound is silent: -80 dB, three steps of 16 bit."""
CLIPPED_LEVEL = 0.999
CLIPPED_SHARE = 0.1
"""Share of samples at full scale from which a sound is broken; loud masters stay under 2 %."""
FULL_SCALE = 32768


def resample(wave: np.ndarray, rate_hz: int, wanted_hz: int) -> np.ndarray:
    """float32 [S] at `rate_hz` -> float32 [ceil(S * wanted_hz / rate_hz)], band-limited (Kaiser-windowed sinc)."""
    if rate_hz == wanted_hz:
        return wave
    return _resampler(rate_hz, wanted_hz)(torch.from_numpy(wave)).numpy()


@lru_cache(maxsize=16)
def _resampler(rate_hz: int, wanted_hz: int) -> torchaudio.transforms.Resample:
    # Kept, because making the kernel costs several times what applying it to a clip does.
    return torchaudio.transforms.Resample(rate_hz, wanted_hz, dtype=torch.float32, **KAISER)


def wave_of(window: DecodedWindow, sample_rate_hz: int, num_samples: int) -> np.ndarray:
    """float32 [num_samples] in [-1, 1) at `sample_rate_hz`, on the 16-bit grid, so that FLAC keeps it exactly.

    Raises:
        MediaError: no_audio, silent, clipped.
    """
    if window.audio is None:
        raise MediaError("no_audio", "the file has no sound")
    # frombuffer gives read-only memory, which torch does not take.
    wave = resample(np.array(window.audio), window.audio_rate_hz, sample_rate_hz)
    margin = window.audio_margin * sample_rate_hz // window.audio_rate_hz
    wave = wave[margin : margin + num_samples]
    check_wave(wave)
    steps = np.clip(np.round(wave.astype(np.float64) * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1)
    return (steps / FULL_SCALE).astype(np.float32)


def check_wave(wave: np.ndarray) -> None:
    """Raise MediaError when a wave is silent (a constant is silence too) or clipped."""
    peak = float(np.abs(wave - wave.mean()).max())
    if peak < SILENCE:
        raise MediaError("silent", f"peak {peak:.2g} around its mean")
    clipped = float((np.abs(wave) >= CLIPPED_LEVEL).mean())
    if clipped > CLIPPED_SHARE:
        raise MediaError("clipped", f"{clipped:.0%} of the samples are at full scale")
