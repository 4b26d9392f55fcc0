"""Bootstrap over clips by weights: one matrix of resampling counts, shared by all models so that comparisons pair.

Row 0 of the matrix is all ones, so a metric written as a function of weights gives its value and its resamples at once.
"""

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % bootstrap interval over clips."""

    value: float
    lo: float
    hi: float


def resampling_weights(num_clips: int, num_resamples: int, seed: int) -> np.ndarray:
    """[1 + R, clips]: a row of ones (the value itself), then R bootstrap resamples as counts."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_clips, np.full(num_clips, 1 / num_clips), size=num_resamples)
    return np.concatenate([np.ones((1, num_clips)), counts.astype(np.float64)])


def estimate(values: np.ndarray) -> Estimate:
    """Value in row 0 and the percentile interval of the other rows, moved so that their mean lies on the value.

    The move does nothing to speak of for a mean or an F1; a Fréchet distance is larger in every resample than in the
    sample (repeated clips have a narrower covariance), which would put the value outside its own interval.
    """
    value = float(values[0])
    resampled = values[1:][np.isfinite(values[1:])]
    if len(resampled) == 0:
        return Estimate(value=value, lo=value, hi=value)
    tail = 100 * (1 - CONFIDENCE) / 2
    lo, hi = np.percentile(resampled, [tail, 100 - tail]) - resampled.mean()
    return Estimate(value=value, lo=value + float(lo), hi=value + float(hi))


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of the known (finite) values [clips] under each row of weights [R, clips]; NaN where none is known."""
    known = np.isfinite(values)
    total = weights[:, known].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weights[:, known] @ values[known] / np.where(total > 0, total, np.nan)


def micro_f1(matched: np.ndarray, detected: np.ndarray, events: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 = 2 matched / (detected + events), each summed over clips first; clips without known events (NaN) left out."""
    known = np.isfinite(events)
    w = weights[:, known]
    possible = w @ (detected[known] + events[known])
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * (w @ matched[known]) / np.where(possible > 0, possible, np.nan)
