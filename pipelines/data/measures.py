"""What is measured of a clip while its wave and frames are in memory: sound, picture and the file it came from.

Pure numbers of what is stored (the wave at the codec's rate, the frames at 16 fps), so that the same clip gives the
same measures wherever it is decoded; nothing here rejects a clip. Thresholds are applied later, as predicates over
these numbers (`pipelines.curation`), without decoding again.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.data.window import SourceFormat

BLOCK_S = 0.05
SILENT_DB = -60.0
"""dBFS under which a block of 50 ms is silent."""
CLIPPED_LEVEL = 0.999
LOUDNESS_BLOCK_S = 0.4
"""The gating block of BS.1770: shorter sound has no loudness."""
CUT_PX = 32
"""Frames are looked at for cuts at this size: the detector's score is a mean over pixels and hardly depends on it."""
STATIC_CELLS = 16
STATIC_LEVEL = 2
"""Steps of 255 that the mean of a cell (a sixteenth of a side) may change by compression alone."""

UNKNOWN_SOURCE = SourceFormat()
NO_PICTURE: dict[str, Any] = dict.fromkeys(("motion", "static_share", "brightness", "num_cuts", "cuts_s"))
"""The measures of a picture that is not there."""


def measure_clip(
    wave: np.ndarray,
    rate_hz: int,
    frames: np.ndarray | None,
    frame_rate_hz: float,
    source: SourceFormat = UNKNOWN_SOURCE,
) -> dict[str, Any]:
    """Everything that `measured.MEASURED` names, of one clip; deterministic.

    Args:
        wave: float32 [S] in [-1, 1].
        rate_hz: its rate.
        frames: uint8 [T, H, W, 3] RGB, T at least 1; None: a clip without video.
        frame_rate_hz: their rate.
        source: what is known of the file.
    """
    return {
        **measure_sound(wave, rate_hz),
        **(NO_PICTURE if frames is None else measure_picture(frames, frame_rate_hz)),
        **{f"source_{name}": value for name, value in vars(source).items()},
    }


def measure_sound(wave: np.ndarray, rate_hz: int) -> dict[str, float | None]:
    """The measures of a wave, float32 [S] in [-1, 1], S at least 1."""
    wide = wave.astype(np.float64)
    magnitude = np.abs(wave)
    return {
        "peak": float(magnitude.max()),
        "rms_db": _decibels(float(np.square(wide).mean())),
        "loudness_lufs": loudness_lufs(wide, rate_hz),
        "silent_share": _silent_share(wide, rate_hz),
        "clipped_share": float((magnitude >= CLIPPED_LEVEL).mean()),
        "dc_offset": float(wide.mean()),
    }


def _decibels(power: float) -> float | None:
    return 10 * math.log10(power) if power > 0 else None


def _silent_share(wave: np.ndarray, rate_hz: int) -> float:
    block = round(BLOCK_S * rate_hz)
    starts = np.arange(0, len(wave), block)
    # The last block may be shorter: its mean is over what it holds.
    counts = np.diff(np.append(starts, len(wave)))
    power = np.add.reduceat(np.square(wave), starts) / counts
    return float((power < 10 ** (SILENT_DB / 10)).mean())


def loudness_lufs(wave: np.ndarray, rate_hz: int) -> float | None:
    """Integrated loudness of a mono wave, float64 [S], after ITU-R BS.1770-4; None where every block is gated away.

    `DeMan` is pyloudnorm's name for the filters that give the standard's own coefficients at 48 kHz: a 997 Hz sine of
    -20 dBFS reads -23.01, as it must, where its default reads -23.05.
    """
    if len(wave) < LOUDNESS_BLOCK_S * rate_hz:
        return None
    # Here, because it imports scipy.signal, seconds that nobody else who imports preprocess should wait for.
    import pyloudnorm

    loudness = float(pyloudnorm.Meter(rate_hz, filter_class="DeMan").integrated_loudness(wave))
    return loudness if math.isfinite(loudness) else None


def measure_picture(frames: np.ndarray, rate_hz: float) -> dict[str, Any]:
    """The measures of frames uint8 [T, H, W, 3] RGB, T at least 1."""
    import cv2

    # Workers share the cores already; and a pool of threads for pictures of this size costs more than it gives.
    cv2.setNumThreads(1)
    steps = [cv2.norm(a, b, cv2.NORM_L1) / a.size for a, b in itertools.pairwise(frames)]
    small = shrink(frames, CUT_PX)
    cells = shrink(small, STATIC_CELLS)
    static = [cv2.norm(a, b, cv2.NORM_INF) <= STATIC_LEVEL for a, b in itertools.pairwise(cells)]
    luma = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).mean() for frame in small]
    cuts_s = [index / rate_hz for index in CutFinder(rate_hz).push(small)]
    return {
        "motion": float(np.mean(steps)) if steps else 0.0,
        "static_share": float(np.mean(static)) if static else 1.0,
        "brightness": float(np.mean(luma)),
        "num_cuts": len(cuts_s),
        "cuts_s": cuts_s,
    }


def shrink(frames: Sequence[np.ndarray] | np.ndarray, size_px: int) -> list[np.ndarray]:
    """Frames uint8 [H, W, 3] as squares of `size_px`, each pixel the mean of what it covers; never enlarged."""
    import cv2

    return [
        cv2.resize(frame, (size_px, size_px), interpolation=cv2.INTER_AREA) if max(frame.shape[:2]) > size_px else frame
        for frame in frames
    ]


class CutFinder:
    """Finds hard cuts in frames that come one after the other, in as many pieces as one likes.

    PySceneDetect's AdaptiveDetector: a frame begins a scene where its difference to the one before stands out of the
    differences around it. Its plain ContentDetector, with one threshold for all, took a fast pan for six cuts and the
    coloured noise of a grey picture for one cut a frame. The price: a cut within two frames of either end is not seen.
    """

    def __init__(self, rate_hz: float) -> None:
        """`rate_hz` is the rate of the frames."""
        from scenedetect.detectors import AdaptiveDetector

        self._rate_hz = float(rate_hz)
        # One frame: no cut is merged with another; which of them matter is for who plans windows to say.
        self._detector = AdaptiveDetector(min_scene_len=1)
        self._count = 0

    def push(self, frames: Sequence[np.ndarray]) -> list[int]:
        """Take frames uint8 [H, W, 3] RGB; indices, counted over all pieces, of those that begin a new scene.

        An index comes two frames late, with the piece that holds what stands after it.
        """
        import cv2
        from scenedetect import FrameTimecode

        cuts = []
        for frame in frames:
            now = FrameTimecode(self._count, self._rate_hz)
            picture = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
            cuts += [cut.frame_num for cut in self._detector.process_frame(now, picture)]
            self._count += 1
        return cuts
