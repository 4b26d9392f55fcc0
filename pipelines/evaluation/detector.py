"""Hears the demo world's events in a waveform by plain signal processing: knows the world's bands, and no network.

Each kind has its own band. An onset is a rise of the band's energy against the preceding 40 ms; pitch is the strongest
of the kind's four tones after it, direction the slope of the band's centre of gravity.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.data.demo_world import BALL_PITCH_HZ, BAR_BAND_HZ, LAMP_PITCH_HZ, SAMPLE_RATE_HZ, Event
from pipelines.errors import InputError

TOLERANCE_S = 0.1
HOP = 160
WINDOW = 320
_FFT = 512
_BEFORE_FRAMES = 4
_RISE = 10 ** (8.0 / 10)
_SETTLE_FRAMES = 15
"""No second onset of a kind within 150 ms: the world leaves at least 240 ms between two of its own."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Where a kind of event sounds, and how strong it has to be."""

    kind: str
    low_hz: float
    high_hz: float
    floor_dbfs: float
    """Level that an onset must reach: 0 is a full-scale sine."""
    sounding_s: float
    """How long after its onset an event certainly sounds."""


BANDS = (
    Band(kind="ball", low_hz=280.0, high_hz=1550.0, floor_dbfs=-32.0, sounding_s=0.09),
    Band(kind="lamp", low_hz=1700.0, high_hz=4200.0, floor_dbfs=-36.0, sounding_s=0.11),
    Band(kind="bar", low_hz=BAR_BAND_HZ[0] - 200, high_hz=BAR_BAND_HZ[1] + 250, floor_dbfs=-40.0, sounding_s=0.36),
)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """An event that was heard; `variant` as in the world's events."""

    time_s: float
    kind: str
    variant: str


@dataclass(frozen=True, kw_only=True)
class MatchCounts:
    """Counts of one clip or of many; add them with `total`."""

    num_events: int
    num_detected: int
    num_matched: int
    """Pairs of the same kind at most the tolerance apart, one to one."""
    num_class_matched: int
    """The same with pitch or direction right too."""
    num_kinds: int
    num_kinds_detected: int
    num_kinds_matched: int

    @property
    def f1(self) -> float:
        """2 matched / (events + detected); 0 where there is neither."""
        return _f1(self.num_matched, self.num_events + self.num_detected)

    @property
    def class_f1(self) -> float:
        """The same with the right pitch or direction."""
        return _f1(self.num_class_matched, self.num_events + self.num_detected)

    @property
    def set_f1(self) -> float:
        """F1 of the kinds present, whenever they sound."""
        return _f1(self.num_kinds_matched, self.num_kinds + self.num_kinds_detected)


def _f1(matched: int, possible: int) -> float:
    return 2 * matched / possible if possible else 0.0


def detect(wave: np.ndarray, rate_hz: int) -> list[Detection]:
    """Events heard in a mono waveform [S] in [-1, 1], in order of time.

    Raises:
        InputError: the waveform is not one-dimensional or not at 16 kHz.
    """
    if wave.ndim != 1 or rate_hz != SAMPLE_RATE_HZ:
        raise InputError(f"the detector wants mono sound at {SAMPLE_RATE_HZ} Hz, got {wave.shape} at {rate_hz} Hz")
    power = _spectrogram(wave)
    found: list[Detection] = []
    for band in BANDS:
        energy = power[:, _bins(band.low_hz, band.high_hz)].sum(axis=1)
        for frame in _onsets(energy, band.floor_dbfs):
            variant = _variant(power, frame, band)
            found.append(Detection(time_s=frame * HOP / SAMPLE_RATE_HZ, kind=band.kind, variant=variant))
    return sorted(found, key=lambda d: (d.time_s, d.kind))


def _spectrogram(wave: np.ndarray) -> np.ndarray:
    """[S] -> power [frames, bins] of 20 ms windows centred on multiples of 10 ms; a full-scale sine sums to 1."""
    padded = np.pad(np.nan_to_num(wave.astype(np.float64)), WINDOW // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    hann = np.hanning(WINDOW + 1)[:-1]
    scale = 4 / (_FFT * (hann**2).sum())
    return np.abs(np.fft.rfft(windows * hann, _FFT)) ** 2 * scale


def _bins(low_hz: float, high_hz: float) -> slice:
    spacing = SAMPLE_RATE_HZ / _FFT
    return slice(round(low_hz / spacing), round(high_hz / spacing) + 1)


def _onsets(energy: np.ndarray, floor_dbfs: float) -> list[int]:
    """Frames where the energy [frames] has risen by 8 dB against the mean of the preceding 40 ms, above the floor."""
    floor = 10 ** (floor_dbfs / 10)
    before = np.pad(energy, (_BEFORE_FRAMES, 0))
    mean_before = np.lib.stride_tricks.sliding_window_view(before, _BEFORE_FRAMES)[:-1].mean(axis=1)
    rising = (energy > floor) & (energy > _RISE * mean_before)
    onsets: list[int] = []
    for frame in np.flatnonzero(rising):
        if not onsets or frame - onsets[-1] >= _SETTLE_FRAMES:
            onsets.append(int(frame))
    return onsets


def _variant(power: np.ndarray, onset: int, band: Band) -> str:
    last = onset + round(band.sounding_s * SAMPLE_RATE_HZ / HOP)
    sounding = power[onset + 1 : last + 1]
    if band.kind == "bar":
        return _direction(sounding[:, _bins(band.low_hz, band.high_hz)])
    pitches = BALL_PITCH_HZ if band.kind == "ball" else LAMP_PITCH_HZ
    strength = {
        name: sounding[:, _bins(hz * 0.94, hz * 1.06)].sum() / (hz if band.kind == "lamp" else 1.0)
        for name, hz in pitches.items()
    }
    return max(strength, key=lambda name: strength[name])


def _direction(power: np.ndarray) -> str:
    """Sign of the energy-weighted covariance of time and frequency in [frames, bins]."""
    frames, bins = np.arange(power.shape[0])[:, None], np.arange(power.shape[1])
    total = max(power.sum(), 1e-20)
    mean_frame, mean_bin = (power * frames).sum() / total, (power * bins).sum() / total
    return "right" if (power * (frames - mean_frame) * (bins - mean_bin)).sum() >= 0 else "left"


def match(detected: Sequence[Detection], events: Sequence[Event], tolerance_s: float = TOLERANCE_S) -> MatchCounts:
    """Compare what was heard in one clip with what is there."""
    kinds, kinds_detected = {e.kind for e in events}, {d.kind for d in detected}
    classes = {(e.kind, e.variant) for e in events}
    return MatchCounts(
        num_events=len(events),
        num_detected=len(detected),
        num_matched=sum(
            _pairs([d.time_s for d in detected if d.kind == k], [e.time_s for e in events if e.kind == k], tolerance_s)
            for k in kinds
        ),
        num_class_matched=sum(
            _pairs(
                [d.time_s for d in detected if (d.kind, d.variant) == c],
                [e.time_s for e in events if (e.kind, e.variant) == c],
                tolerance_s,
            )
            for c in classes
        ),
        num_kinds=len(kinds),
        num_kinds_detected=len(kinds_detected),
        num_kinds_matched=len(kinds & kinds_detected),
    )


def _pairs(detected: list[float], events: list[float], tolerance_s: float) -> int:
    """Size of the largest one-to-one matching of two sets of times: on a line, first come first served is optimal."""
    detected, events = sorted(detected), sorted(events)
    matched = i = j = 0
    while i < len(detected) and j < len(events):
        if abs(detected[i] - events[j]) <= tolerance_s:
            matched, i, j = matched + 1, i + 1, j + 1
        elif detected[i] < events[j]:
            i += 1
        else:
            j += 1
    return matched


def total(counts: Iterable[MatchCounts]) -> MatchCounts:
    """Sum over clips: its `f1`, `class_f1` and `set_f1` are those over all events of all clips."""
    listed = list(counts)
    return MatchCounts(
        num_events=sum(c.num_events for c in listed),
        num_detected=sum(c.num_detected for c in listed),
        num_matched=sum(c.num_matched for c in listed),
        num_class_matched=sum(c.num_class_matched for c in listed),
        num_kinds=sum(c.num_kinds for c in listed),
        num_kinds_detected=sum(c.num_kinds_detected for c in listed),
        num_kinds_matched=sum(c.num_kinds_matched for c in listed),
    )
