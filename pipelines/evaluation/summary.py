"""Scores of one or more models -> one table with intervals.

Models are compared on the same clips with the same noise, so every interval is a bootstrap over clips and every
difference is paired: all models share one matrix of resampling weights. A metric is a function of those weights, so a
mean, a micro-averaged F1 and a Fréchet distance all get their interval the same way. Rows are joined by `clip_id`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.errors import InputError
from pipelines.evaluation.bootstrap import (
    CONFIDENCE,
    Estimate,
    estimate,
    micro_f1,
    resampling_weights,
    weighted_mean,
)
from pipelines.evaluation.metrics import frechet_distance
from pipelines.evaluation.ranking_quality import within_clip_correlation
from pipelines.evaluation.scores import ClipScores, check_same_clips

FRECHET_CLIPS = 2000
"""Below about this many clips a Fréchet distance is dominated by its small-sample bias; the tables then say so."""
LEAST_SPREAD_DB = 1.0
"""A statistic that varies less among real sounds counts as varying so much: no noise floor may rule the distance."""
FRECHET_RESAMPLES = 200
"""Upper bound of resamples for the Fréchet distance, whose every value needs an eigendecomposition."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One column of the table."""

    name: str
    title: str
    better: Literal["up", "down"]
    meaning: str
    of: Callable[[ClipScores, np.ndarray], np.ndarray]
    """(scores, weights [R, clips]) -> value under each row of weights [R]; NaN where it is not defined."""
    column: str | None = None
    """The per-clip column it is the mean of; None for a metric of all clips together."""
    max_resamples: int = 10_000


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The table: a value for each subject and metric, and the paired difference from the baseline."""

    labels: tuple[str, ...]
    baseline: str
    metrics: tuple[Metric, ...]
    num_clips: int
    num_invalid: dict[str, int]
    estimates: dict[str, dict[str, Estimate]]
    """label -> metric -> estimate; a metric that a subject does not have is absent."""
    differences: dict[str, dict[str, Estimate]]
    """label -> metric -> subject minus baseline, paired by clip; the baseline itself is absent."""

    @property
    def cautions(self) -> tuple[str, ...]:
        """What a reader of the table must know, in whole sentences."""
        if self.num_clips >= FRECHET_CLIPS or not any(m.name.startswith("frechet") for m in self.metrics):
            return ()
        return (
            f"The Fréchet distance is over {self.num_clips} clips only (below about {FRECHET_CLIPS} its own bias is "
            "large): compare it between subjects of this table, not with other tables.",
        )

    def to_json(self) -> dict[str, object]:
        """Plain dictionaries, for `summary.json`."""
        return {
            "num_clips": self.num_clips,
            "baseline": self.baseline,
            "confidence": CONFIDENCE,
            "cautions": list(self.cautions),
            "metrics": {m.name: {"title": m.title, "better": m.better, "meaning": m.meaning} for m in self.metrics},
            "subjects": {
                label: {
                    "num_invalid": self.num_invalid[label],
                    "values": {name: vars(e) for name, e in self.estimates[label].items()},
                    "difference_from_baseline": {name: vars(e) for name, e in self.differences.get(label, {}).items()},
                }
                for label in self.labels
            },
        }


def _mean_of(name: str) -> Callable[[ClipScores, np.ndarray], np.ndarray]:
    return lambda scores, weights: weighted_mean(scores.values[name], weights)


def _f1_of(matched: str) -> Callable[[ClipScores, np.ndarray], np.ndarray]:
    def f1(scores: ClipScores, weights: np.ndarray) -> np.ndarray:
        v = scores.values
        return micro_f1(v[matched], v["num_detected"], v["num_events"], weights)

    return f1


def _frechet(scores: ClipScores, weights: np.ndarray) -> np.ndarray:
    return _frechet_to(scores.truth_statistics, scores, weights)


def _frechet_codec(scores: ClipScores, weights: np.ndarray) -> np.ndarray:
    return _frechet_to(scores.codec_statistics, scores, weights)


def _frechet_to(reference: np.ndarray | None, scores: ClipScores, weights: np.ndarray) -> np.ndarray:
    """Fréchet distance of the statistics to those of a reference, both in units of the reference's spread."""
    if reference is None or scores.num_clips < 2:
        return np.full(len(weights), np.nan)
    scale = np.maximum(reference.std(axis=0), LEAST_SPREAD_DB)
    subject, wanted = scores.statistics / scale, reference / scale
    values = []
    for row in weights:
        index = np.repeat(np.arange(scores.num_clips), row.astype(int))
        values.append(frechet_distance(subject[index], wanted[index]))
    return np.array(values)


def _rank_correlation(scores: ClipScores, weights: np.ndarray) -> np.ndarray:
    return weighted_mean(within_clip_correlation(scores), weights)


METRICS: tuple[Metric, ...] = (
    Metric(
        name="reward",
        title="reward R",
        better="up",
        meaning="SF-CAVP's calibrated reward, in z-units of real pairs; the quantity RPO trains for",
        of=_mean_of("reward"),
        column="reward",
    ),
    Metric(
        name="reward_semantic",
        title="S_sem",
        better="up",
        meaning="its slow part: does this sound belong to this picture",
        of=_mean_of("reward_semantic"),
        column="reward_semantic",
    ),
    Metric(
        name="reward_temporal",
        title="S_tmp",
        better="up",
        meaning="its fast part: at this moment rather than shifted",
        of=_mean_of("reward_temporal"),
        column="reward_temporal",
    ),
    Metric(
        name="f1",
        title="onset F1",
        better="up",
        meaning="known events found within 100 ms by the independent detector, over all clips",
        of=_f1_of("num_matched"),
    ),
    Metric(
        name="class_f1",
        title="class F1",
        better="up",
        meaning="the same where pitch or direction must be right too",
        of=_f1_of("num_class_matched"),
    ),
    Metric(
        name="log_mel_distance",
        title="log-mel dist.",
        better="down",
        meaning="mean absolute log-mel difference from the real sound, decibels",
        of=_mean_of("mel_distance"),
        column="mel_distance",
    ),
    Metric(
        name="frechet_codec",
        title="Fréchet to codec",
        better="down",
        meaning="Fréchet distance of simple audio statistics to those of the real sounds after the codec, in units of "
        "their spread; 0 is the best that a policy on this codec can reach",
        of=_frechet_codec,
        max_resamples=FRECHET_RESAMPLES,
    ),
    Metric(
        name="frechet",
        title="Fréchet dist.",
        better="down",
        meaning="Fréchet distance of simple audio statistics to those of the recorded sounds, in units of their "
        "spread; that of the real sounds after the codec is not 0",
        of=_frechet,
        max_resamples=FRECHET_RESAMPLES,
    ),
    Metric(
        name="diversity",
        title="diversity",
        better="up",
        meaning="mean log-mel distance between the candidates of one clip, decibels",
        of=_mean_of("diversity"),
        column="diversity",
    ),
    Metric(
        name="fm_loss",
        title="FM error",
        better="down",
        meaning="flow-matching error on the real sound: what training without preferences would lower",
        of=_mean_of("fm_loss"),
        column="fm_loss",
    ),
    Metric(
        name="within_clip_rho",
        title="rank rho",
        better="up",
        meaning="rank correlation of the reward with the independent score among candidates of one clip",
        of=_rank_correlation,
    ),
)


def summarise(
    scores: Mapping[str, ClipScores], *, baseline: str | None = None, num_resamples: int = 1000, seed: int = 0
) -> Summary:
    """Values, 95 % intervals and paired differences from `baseline` (default: the first subject).

    Raises `InputError` where the subjects do not cover exactly the same clips.
    """
    labels = tuple(scores)
    base = labels[0] if baseline is None else baseline
    if base not in scores:
        raise InputError(f"baseline {base!r} is not among the subjects {list(labels)}; name one of them")
    check_same_clips(scores)
    num_clips = scores[base].num_clips
    weights = resampling_weights(num_clips, num_resamples, seed)
    estimates: dict[str, dict[str, Estimate]] = {label: {} for label in labels}
    differences: dict[str, dict[str, Estimate]] = {label: {} for label in labels if label != base}
    for metric in METRICS:
        rows = weights[: metric.max_resamples + 1]
        values = {label: metric.of(scores[label], rows) for label in labels}
        for label in labels:
            if math.isfinite(values[label][0]):
                estimates[label][metric.name] = estimate(values[label])
        if not math.isfinite(values[base][0]):
            continue
        for label in differences:
            pair = paired_difference(metric, (scores[label], values[label]), (scores[base], values[base]), rows)
            if math.isfinite(pair[0]):
                differences[label][metric.name] = estimate(pair)
    used = tuple(m for m in METRICS if any(m.name in estimates[label] for label in labels))
    return Summary(
        labels=labels,
        baseline=base,
        metrics=used,
        num_clips=num_clips,
        num_invalid={label: scores[label].num_invalid for label in labels},
        estimates=estimates,
        differences=differences,
    )


def paired_difference(
    metric: Metric, subject: tuple[ClipScores, np.ndarray], base: tuple[ClipScores, np.ndarray], weights: np.ndarray
) -> np.ndarray:
    """Subject minus base under each row of weights [R, clips]: [R].

    `subject` and `base` are scores of the same clips with the metric's values under those weights. Clips on which
    either lacks the metric's column count for neither.
    """
    if metric.column is not None:
        known = np.isfinite(subject[0].values[metric.column]) & np.isfinite(base[0].values[metric.column])
        if not known.all():
            weights = weights * known
            return metric.of(subject[0], weights) - metric.of(base[0], weights)
    return subject[1] - base[1]


def point_values(scores: ClipScores) -> dict[str, float]:
    """The value of each metric of one subject, by name and without interval; a metric it does not have is absent."""
    estimates = summarise({"subject": scores}, num_resamples=1).estimates["subject"]
    return {name: estimate.value for name, estimate in estimates.items()}
