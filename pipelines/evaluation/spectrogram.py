"""Log-mel spectrograms as small PNG pictures with one decibel scale for all sounds of a clip."""

import io

import matplotlib
import numpy as np
import torch
import torchaudio
from PIL import Image

BANDS = 96
COLUMNS = 560
WINDOW_S = 0.025
RANGE_DB = 70.0
LOWEST_HZ = 60.0


def mel_decibels(wave: np.ndarray, rate_hz: int) -> np.ndarray:
    """Wave [samples] in [-1, 1] -> mel power in dB [BANDS, about COLUMNS], centred, low bands first."""
    window = round(WINDOW_S * rate_hz)
    n_fft = 2 ** (4 * window - 1).bit_length()
    hop = max(1, len(wave) // COLUMNS)
    spectrum = torch.stft(
        torch.from_numpy(np.ascontiguousarray(wave, np.float32)),
        n_fft,
        hop_length=hop,
        win_length=window,
        window=torch.hann_window(window),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    bank = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, LOWEST_HZ, rate_hz / 2, BANDS, rate_hz)
    power = bank.T @ spectrum.abs().square()
    return (10 * torch.log10(power + 1e-10)).numpy()


def spectrogram_png(decibels: np.ndarray, loudest_db: float) -> bytes:
    """[bands, columns] in dB -> a PNG with low bands at the bottom; the scale ends at `loudest_db`."""
    level = np.clip((decibels - loudest_db + RANGE_DB) / RANGE_DB, 0.0, 1.0)[::-1]
    palette = (255 * matplotlib.colormaps["magma"](np.linspace(0, 1, 256))[:, :3]).round().astype(np.uint8)
    image = Image.fromarray((255 * level).round().astype(np.uint8), mode="P")
    image.putpalette(palette.reshape(-1).tolist())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
