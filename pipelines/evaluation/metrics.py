"""Measures of generated sound against real sound that share nothing with the reward.

Legend: B clips, S samples, D features, L labels, M mel bins, F frames.
"""

import numpy as np
import torch

from models.mel import MEL_CONFIGS, LogMel

MEL_FLOOR_DB = -60.0
"""Below this level, relative to a full-scale sine's mel peak, differences do not count."""
NUM_BANDS = 20
"""Bands of the audio statistics; each clip gives a mean and a standard deviation over time for each."""
INCEPTION_SPLITS = 10
INCEPTION_SEED = 2020


class MelMeasure:
    """Log-mel pictures in decibels, for distances and statistics; one a sample rate, made once a worker."""

    def __init__(self, spec_name: str) -> None:
        """The mel of the spec's codec, clamped at 60 dB below full scale."""
        self._mel = LogMel(MEL_CONFIGS[spec_name])
        config = MEL_CONFIGS[spec_name]
        tone = torch.sin(2 * torch.pi * 1000 * torch.arange(8 * config.n_fft) / config.sample_rate_hz)
        self._peak_db = self._decibels(self._mel(tone[None])).max()

    def _decibels(self, log_mel: torch.Tensor) -> torch.Tensor:
        config = self._mel.config
        power_of_ten = log_mel if config.log == "log10" else log_mel / np.log(10)
        return power_of_ten * (20 if config.spectrum == "magnitude" else 10)

    @torch.no_grad()
    def picture(self, wave: np.ndarray) -> np.ndarray:
        """Wave [S] or waves [B, S] in [-1, 1] at the spec's rate -> decibels [(B,) M, F] in [-60, about 0]."""
        waves = torch.from_numpy(np.ascontiguousarray(np.atleast_2d(wave), np.float32))
        picture = (self._decibels(self._mel(waves)) - self._peak_db).clamp_min(MEL_FLOOR_DB).numpy()
        return picture.reshape(*wave.shape[:-1], *picture.shape[1:])


def log_mel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two pictures of `MelMeasure`, in decibels."""
    return float(np.abs(a - b).mean())


def diversity(pictures: np.ndarray) -> float:
    """Mean log-mel distance over all pairs of candidates of one clip, [N, M, F]; NaN below two candidates."""
    n = len(pictures)
    if n < 2:
        return float("nan")
    pairs = [log_mel_distance(pictures[i], pictures[j]) for i in range(n) for j in range(i)]
    return float(np.mean(pairs))


def audio_statistics(picture: np.ndarray) -> np.ndarray:
    """Simple statistics of one sound for a Fréchet distance: float32 [2 NUM_BANDS].

    The mel bins of a picture [M, F] are averaged to NUM_BANDS bands of nearly equally many bins; the features are each
    band's mean level over time, then each band's standard deviation over time, in decibels. They know which bands
    sound, how much and how unevenly, and nothing of when.
    """
    bands = np.stack([group.mean(axis=0) for group in np.array_split(picture, NUM_BANDS, axis=0)])
    return np.concatenate([bands.mean(axis=1), bands.std(axis=1)]).astype(np.float32)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to features [B1, D] and [B2, D], float64, >= 0.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), covariances with N - 1 (Dowson and Landau 1982;
    the form of av-benchmark). The trace of the root is taken of root(cov_a) cov_b root(cov_a), which has the same
    eigenvalues and is symmetric: singular covariances need no special care.

    Raises:
        ValueError: fewer than two rows, or unequal widths.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"Fréchet distance wants two sets of at least 2 rows of one width, got {a.shape} and {b.shape}"
        )
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    root_trace = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0)).sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
    return float(max(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace, 0.0))


def kl_divergence(truth_logits: np.ndarray, subject_logits: np.ndarray) -> float:
    """Mean over pairs of KL(softmax(truth) || softmax(subject)), logits [B, L] of the same clips in the same order."""
    truth, subject = _log_softmax(truth_logits), _log_softmax(subject_logits)
    return float((np.exp(truth) * (truth - subject)).sum(axis=1).mean())


def kl_divergence_sigmoid(truth_logits: np.ndarray, subject_logits: np.ndarray) -> float:
    """The field's multi-label variant: mean over pairs of the sum over labels of p log(p / q), p and q by sigmoid."""
    truth, subject = _log_sigmoid(truth_logits), _log_sigmoid(subject_logits)
    return float((np.exp(truth) * (truth - subject)).sum(axis=1).mean())


def inception_score(logits: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation over 10 splits of exp(mean KL(p(y|x) || p(y))), logits [B >= 10, L].

    Rows are shuffled with seed 2020 and cut at i B // 10, as av-benchmark does.

    Raises:
        ValueError: fewer rows than splits.
    """
    count = len(logits)
    if count < INCEPTION_SPLITS:
        raise ValueError(f"inception score wants at least {INCEPTION_SPLITS} clips, got {count}")
    shuffled = _log_softmax(logits)[np.random.RandomState(INCEPTION_SEED).permutation(count)]
    scores = []
    for i in range(INCEPTION_SPLITS):
        part = shuffled[i * count // INCEPTION_SPLITS : (i + 1) * count // INCEPTION_SPLITS]
        probability = np.exp(part)
        # By logarithms: a label that no clip of the part has would underflow to log 0.
        marginal = np.logaddexp.reduce(part, axis=0, keepdims=True) - np.log(len(part))
        scores.append(np.exp((probability * (part - marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _log_sigmoid(logits: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -logits.astype(np.float64))
