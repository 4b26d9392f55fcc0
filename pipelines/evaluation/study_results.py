"""The numbers of a study from whatever of its cells is done: means over replicates, intervals and spread.

Two uncertainties are kept apart. The interval is a bootstrap over clips of the mean over replicates, with one matrix of
resampling weights for all subjects and replicates, so that every comparison is paired by clip. The spread is the
standard deviation over replicates of the same number, each with an M_0, a reward and draws of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.evaluation.bootstrap import Estimate, estimate, resampling_weights
from pipelines.evaluation.ranking_quality import best_of_n, within_clip_correlation
from pipelines.evaluation.scores import ClipScores, check_same_clips
from pipelines.evaluation.summary import METRICS, Metric, paired_difference

TABLE_METRICS = ("class_f1", "f1", "frechet_codec", "frechet", "reward", "log_mel_distance", "diversity", "fm_loss")
"""What the tables show, the first the one that decides."""
NUM_RESAMPLES = 1000
Cells = Mapping[str, Mapping[int, ClipScores]]
"""Subject -> replicate -> its scores."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number of a subject, or of a comparison."""

    mean: Estimate
    """Mean over the replicates, with its interval over clips."""
    by_seed: dict[int, float]
    spread: float
    """Standard deviation over replicates; NaN of a single one."""


def metric_named(name: str) -> Metric:
    """The metric of that name."""
    return next(metric for metric in METRICS if metric.name == name)


class StudyNumbers:
    """Values of every metric under one matrix of resampling weights, computed once a cell."""

    def __init__(self, cells: Cells, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> None:
        """Raises InputError where cells do not cover the same clips."""
        flat = {f"{subject}, seed {s}": c for subject, by_seed in cells.items() for s, c in by_seed.items()}
        check_same_clips(flat)
        self.cells = cells
        self.num_clips = next(iter(flat.values())).num_clips
        self._weights = resampling_weights(self.num_clips, num_resamples, seed)
        self._values: dict[tuple[str, int, str], np.ndarray] = {}

    def value(self, subject: str, metric: str) -> Result | None:
        """A metric of a subject; None where no replicate has it."""
        return _result({seed: self._of(subject, seed, metric) for seed in self.cells[subject]})

    def difference(self, subject: str, reference: str, metric: str) -> Result | None:
        """Subject minus reference, paired by clip and replicate; None where no replicate has both."""
        shared = self.shared(subject, reference)
        return _result({seed: self._difference(subject, reference, seed, metric_named(metric)) for seed in shared})

    def shared(self, subject: str, reference: str) -> list[int]:
        """The replicates that both have; of a subject that is not there, none."""
        return [seed for seed in self.cells.get(subject, {}) if seed in self.cells.get(reference, {})]

    def _difference(self, subject: str, reference: str, seed: int, metric: Metric) -> np.ndarray:
        sides = [(self.cells[side][seed], self._of(side, seed, metric.name)) for side in (subject, reference)]
        return paired_difference(metric, sides[0], sides[1], self._rows(metric))

    def _of(self, subject: str, seed: int, name: str) -> np.ndarray:
        key = subject, seed, name
        if key not in self._values:
            metric = metric_named(name)
            self._values[key] = metric.of(self.cells[subject][seed], self._rows(metric))
        return self._values[key]

    def _rows(self, metric: Metric) -> np.ndarray:
        return self._weights[: metric.max_resamples + 1]


def _result(values: Mapping[int, np.ndarray]) -> Result | None:
    values = {seed: rows for seed, rows in values.items() if math.isfinite(rows[0])}
    if not values:
        return None
    points = {seed: float(rows[0]) for seed, rows in values.items()}
    spread = float(np.std(list(points.values()), ddof=1)) if len(points) > 1 else math.nan
    return Result(mean=estimate(np.mean(list(values.values()), axis=0)), by_seed=points, spread=spread)


@dataclass(frozen=True, kw_only=True)
class RankingResult:
    """How well one reward ranks the candidates of M_0 within a clip, in one replicate."""

    rho: Estimate
    """Mean rank correlation with the independent score."""
    picked: dict[int, float]
    """Class-aware F1 of the best of n candidates by the reward; of one, a random candidate's."""
    oracle: dict[int, float]
    """The same by the independent score itself."""

    @property
    def share(self) -> float:
        """Share of the oracle's gain over a random candidate that the reward gains, at the most candidates."""
        gain, most = (curve[max(curve)] - curve[1] for curve in (self.picked, self.oracle))
        return gain / most if most > 0 else math.nan


def ranking_result(scores: ClipScores) -> RankingResult:
    """Measure a reward by an evaluation with several candidates a clip."""
    correlation = within_clip_correlation(scores)
    known = correlation[np.isfinite(correlation)]
    weights = resampling_weights(len(known), NUM_RESAMPLES, 0)
    curve = best_of_n(scores)
    return RankingResult(
        rho=estimate(weights @ known / weights.sum(axis=1)),
        picked={n: point.value for n, point in curve.picked.items()},
        oracle={n: point.value for n, point in curve.oracle.items()},
    )


def to_json(numbers: StudyNumbers, compared_with: Sequence[str]) -> dict[str, Any]:
    """Every value and every difference, as plain values."""
    subjects = list(numbers.cells)
    return {
        "num_clips": numbers.num_clips,
        "values": {s: {m: _plain(numbers.value(s, m)) for m in TABLE_METRICS} for s in subjects},
        "differences": {
            reference: {
                s: {m: _plain(numbers.difference(s, reference, m)) for m in TABLE_METRICS}
                for s in subjects
                if s != reference
            }
            for reference in compared_with
            if reference in numbers.cells
        },
    }


def _plain(result: Result | None) -> dict[str, Any] | None:
    return None if result is None else asdict(result)
