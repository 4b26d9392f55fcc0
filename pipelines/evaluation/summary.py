"""Scores of one or more models -> one table with intervals.

Models are compared on the same clips with the same noise, so every interval is a bootstrap over clips and every
difference is paired: all models share one matrix of resampling weights. A metric is a function of those weights, so a
mean, a micro-averaged F1 and a Fréchet distance all get their interval the same way. Rows are joined by `clip_id`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from scipy import stats

from pipelines.data.contracts import column_to_numpy
from pipelines.errors import ContractError, InputError
from pipelines.evaluation.metrics import frechet_distance

CONFIDENCE = 0.95
FRECHET_RESAMPLES = 200
"""Upper bound of resamples for the Fréchet distance, whose every value needs an eigendecomposition."""


@dataclass(frozen=True, kw_only=True)
class ClipScores:
    """The numbers of one scores dataset as arrays over clips, sorted by `clip_id`; missing values are NaN."""

    clip_ids: tuple[str, ...]
    values: dict[str, np.ndarray]
    """Scalar columns, each float64 [clips]."""
    candidates: dict[str, np.ndarray]
    """Fields of the candidates, each float64 [clips, N]."""
    statistics: np.ndarray
    """Audio statistics of the scored sound, float64 [clips, D]."""
    truth_statistics: np.ndarray
    """The same of the real sound."""

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Read a scores table; raises `ContractError` where clips have unequal numbers of candidates."""
        table = table.sort_by("clip_id")
        clip_ids = tuple(table["clip_id"].to_pylist())
        scalar_names = [field.name for field in table.schema if _is_number(field.type)]
        counts = set(table["candidates"].combine_chunks().value_lengths().to_pylist())
        if len(counts) > 1:
            raise ContractError(
                f"scores: clips have {sorted(counts)} candidates; evaluate all clips with one --candidates"
            )
        return cls(
            clip_ids=clip_ids,
            values={name: _floats(table[name]) for name in scalar_names},
            candidates=_candidate_fields(table["candidates"], len(clip_ids)),
            statistics=column_to_numpy(table["statistics"]).astype(np.float64),
            truth_statistics=column_to_numpy(table["truth_statistics"]).astype(np.float64),
        )

    @property
    def num_clips(self) -> int:
        """Clips scored."""
        return len(self.clip_ids)

    @property
    def num_candidates(self) -> int:
        """Candidates a clip."""
        return self.candidates["total"].shape[1]

    @property
    def num_invalid(self) -> int:
        """Clips whose sound the reward refuses (silent, clipped, not finite)."""
        return int(np.isnan(self.values["reward"]).sum())

    @property
    def has_events(self) -> bool:
        """Whether any clip has known events; without them there is no onset F1."""
        return bool(np.isfinite(self.values["num_events"]).any())


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One column of the table."""

    name: str
    title: str
    better: Literal["up", "down"]
    meaning: str
    of: Callable[[ClipScores, np.ndarray], np.ndarray]
    """(scores, weights [R, clips]) -> value under each row of weights [R]; NaN where it is not defined."""
    max_resamples: int = 10_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % bootstrap interval over clips."""

    value: float
    lo: float
    hi: float


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

    def to_json(self) -> dict[str, object]:
        """Plain dictionaries, for `summary.json`."""
        return {
            "num_clips": self.num_clips,
            "baseline": self.baseline,
            "confidence": CONFIDENCE,
            "metrics": {
                m.name: {"title": m.title, "better": m.better, "meaning": m.meaning} for m in self.metrics
            },
            "subjects": {
                label: {
                    "num_invalid": self.num_invalid[label],
                    "values": {name: vars(e) for name, e in self.estimates[label].items()},
                    "difference_from_baseline": {
                        name: vars(e) for name, e in self.differences.get(label, {}).items()
                    },
                }
                for label in self.labels
            },
        }


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).fill_null(math.nan).to_numpy()


def _candidate_fields(column: pa.ChunkedArray, num_clips: int) -> dict[str, np.ndarray]:
    entries = column.combine_chunks()
    flat = entries.flatten()
    return {
        field.name: _floats(pa.chunked_array([flat.field(field.name)])).reshape(num_clips, -1)
        for field in entries.type.value_type
    }


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    total = weights[:, known].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weights[:, known] @ values[known] / np.where(total > 0, total, np.nan)


def _mean_of(name: str) -> Callable[[ClipScores, np.ndarray], np.ndarray]:
    return lambda scores, weights: _weighted_mean(scores.values[name], weights)


def _micro_f1(
    matched: np.ndarray, detected: np.ndarray, events: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    known = np.isfinite(events)
    w = weights[:, known]
    possible = w @ (detected[known] + events[known])
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * (w @ matched[known]) / np.where(possible > 0, possible, np.nan)


def _f1_of(matched: str) -> Callable[[ClipScores, np.ndarray], np.ndarray]:
    def f1(scores: ClipScores, weights: np.ndarray) -> np.ndarray:
        v = scores.values
        return _micro_f1(v[matched], v["num_detected"], v["num_events"], weights)

    return f1


def _frechet(scores: ClipScores, weights: np.ndarray) -> np.ndarray:
    """Fréchet distance of the statistics to those of the real sounds, both standardised by the real ones."""
    mean, scale = scores.truth_statistics.mean(axis=0), scores.truth_statistics.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1.0)
    subject, truth = (scores.statistics - mean) / scale, (scores.truth_statistics - mean) / scale
    if scores.num_clips < 2:
        return np.full(len(weights), np.nan)
    values = []
    for row in weights:
        index = np.repeat(np.arange(scores.num_clips), row.astype(int))
        values.append(frechet_distance(subject[index], truth[index]))
    return np.array(values)


def _rank_correlation(scores: ClipScores, weights: np.ndarray) -> np.ndarray:
    return _weighted_mean(within_clip_correlation(scores), weights)


METRICS: tuple[Metric, ...] = (
    Metric(
        name="reward",
        title="reward R",
        better="up",
        meaning="SF-CAVP's calibrated reward, in z-units of real pairs; the quantity RPO trains for",
        of=_mean_of("reward"),
    ),
    Metric(
        name="reward_semantic",
        title="S_sem",
        better="up",
        meaning="its slow part: does this sound belong to this picture",
        of=_mean_of("reward_semantic"),
    ),
    Metric(
        name="reward_temporal",
        title="S_tmp",
        better="up",
        meaning="its fast part: at this moment rather than shifted",
        of=_mean_of("reward_temporal"),
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
        of=_f1_of("num_matched_class"),
    ),
    Metric(
        name="log_mel_distance",
        title="log-mel dist.",
        better="down",
        meaning="mean absolute log-mel difference from the real sound",
        of=_mean_of("log_mel_distance"),
    ),
    Metric(
        name="frechet",
        title="Fréchet dist.",
        better="down",
        meaning="Fréchet distance of simple audio statistics to those of the real sounds of the same clips",
        of=_frechet,
        max_resamples=FRECHET_RESAMPLES,
    ),
    Metric(
        name="diversity",
        title="diversity",
        better="up",
        meaning="mean log-mel distance between the candidates of one clip",
        of=_mean_of("diversity"),
    ),
    Metric(
        name="within_clip_rho",
        title="within-clip rho",
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
    weights = _resampling_weights(num_clips, num_resamples, seed)
    estimates: dict[str, dict[str, Estimate]] = {label: {} for label in labels}
    differences: dict[str, dict[str, Estimate]] = {label: {} for label in labels if label != base}
    for metric in METRICS:
        rows = weights[: metric.max_resamples + 1]
        values = {label: metric.of(scores[label], rows) for label in labels}
        for label in labels:
            if math.isfinite(values[label][0]):
                estimates[label][metric.name] = _estimate(values[label])
        if not math.isfinite(values[base][0]):
            continue
        for label in differences:
            pair = _paired(metric, scores[label], scores[base], values[label], values[base], rows)
            if math.isfinite(pair[0]):
                differences[label][metric.name] = _estimate(pair)
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


def check_same_clips(scores: Mapping[str, ClipScores]) -> None:
    """Raise `InputError` unless every subject has exactly the same clips."""
    labels = list(scores)
    first = set(scores[labels[0]].clip_ids)
    for label in labels[1:]:
        extra, lacking = set(scores[label].clip_ids) - first, first - set(scores[label].clip_ids)
        if extra or lacking:
            example = min(extra | lacking)
            raise InputError(
                f"scores {label!r} and {labels[0]!r} differ in their clips: {len(lacking)} lacking, {len(extra)} more, "
                f"such as {example!r}; evaluate both on the same features and split"
            )


def _resampling_weights(num_clips: int, num_resamples: int, seed: int) -> np.ndarray:
    """[1 + R, clips]: a row of ones (the value itself), then R bootstrap resamples as counts."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_clips, np.full(num_clips, 1 / num_clips), size=num_resamples)
    return np.concatenate([np.ones((1, num_clips)), counts.astype(np.float64)])


def _paired(
    metric: Metric,
    subject: ClipScores,
    base: ClipScores,
    subject_values: np.ndarray,
    base_values: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """Subject minus baseline under each row; clips on which either lacks the column count for neither."""
    if metric.name in subject.values:
        known = np.isfinite(subject.values[metric.name]) & np.isfinite(base.values[metric.name])
        if not known.all():
            weights = weights * known
            return metric.of(subject, weights) - metric.of(base, weights)
    return subject_values - base_values


def _estimate(values: np.ndarray) -> Estimate:
    """Value in row 0, percentile interval of the other rows."""
    resampled = values[1:][np.isfinite(values[1:])]
    if len(resampled) == 0:
        return Estimate(value=float(values[0]), lo=float(values[0]), hi=float(values[0]))
    tail = 100 * (1 - CONFIDENCE) / 2
    lo, hi = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(value=float(values[0]), lo=float(lo), hi=float(hi))


def independent_score(scores: ClipScores) -> np.ndarray:
    """A score of each candidate that shares nothing with the reward, higher is better: [clips, N].

    The clip's class-aware onset F1 where there are known events, else minus the log-mel distance to the truth.
    """
    if not scores.has_events:
        return -scores.candidates["log_mel_distance"]
    c = scores.candidates
    possible = c["num_detected"] + scores.values["num_events"][:, None]
    return np.where(possible > 0, 2 * c["num_matched_class"] / np.where(possible > 0, possible, 1.0), 0.0)


def within_clip_correlation(scores: ClipScores) -> np.ndarray:
    """Spearman's rho of reward and independent score among each clip's candidates: [clips].

    NaN where it is not defined: fewer than two valid candidates, or one of the two is the same for all of them.
    """
    reward, score = scores.candidates["total"], independent_score(scores)
    result = np.full(scores.num_clips, np.nan)
    for i in range(scores.num_clips):
        valid = np.isfinite(reward[i]) & np.isfinite(score[i])
        a, b = stats.rankdata(reward[i, valid]), stats.rankdata(score[i, valid])
        if len(a) > 1 and a.std() > 0 and b.std() > 0:
            result[i] = np.corrcoef(a, b)[0, 1]
    return result


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """The independent score of the best of n candidates, picked by the reward and picked by the score itself."""

    score: Literal["class_f1", "log_mel_distance"]
    picked: dict[int, Estimate]
    oracle: dict[int, Estimate]

    def to_json(self) -> dict[str, object]:
        """`bon_<n>` and `oracle_<n>` with their intervals, and what the score is."""
        flat: dict[str, object] = {"score": self.score}
        for prefix, curve in (("bon", self.picked), ("oracle", self.oracle)):
            for n, estimate in curve.items():
                flat |= {f"{prefix}_{n}": estimate.value, f"{prefix}_{n}_lo": estimate.lo}
                flat |= {f"{prefix}_{n}_hi": estimate.hi}
        return flat


def best_of_n(scores: ClipScores, *, num_resamples: int = 1000, seed: int = 0) -> BestOfN:
    """The Best-of-N curve for every n up to the number of candidates.

    The expectation over ALL subsets of n candidates, in closed form: the candidate of rank r (0 = best) among N is
    the best of a random n-subset with probability C(N-1-r, n-1) / C(N, n). With events the score is the
    class-aware F1 micro-averaged over clips (of expected counts), so that `picked[1]` is what the model itself has.
    A candidate that the reward refuses ranks last.
    """
    num_candidates = scores.num_candidates
    weights = _resampling_weights(scores.num_clips, num_resamples, seed)
    reward = np.where(np.isfinite(scores.candidates["total"]), scores.candidates["total"], -np.inf)
    oracle_key = np.nan_to_num(independent_score(scores), nan=-np.inf)
    curves: list[dict[int, Estimate]] = []
    for key in (reward, oracle_key):
        order = np.argsort(-key, axis=1, kind="stable")
        curve = {}
        for n in range(1, num_candidates + 1):
            ways = [math.comb(num_candidates - 1 - r, n - 1) for r in range(num_candidates)]
            chance = np.array(ways) / math.comb(num_candidates, n)
            curve[n] = _estimate(_expected_score(scores, order, chance, weights))
        curves.append(curve)
    kind = "class_f1" if scores.has_events else "log_mel_distance"
    return BestOfN(score=kind, picked=curves[0], oracle=curves[1])


def _expected_score(
    scores: ClipScores, order: np.ndarray, chance: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    def expected(name: str) -> np.ndarray:
        return np.take_along_axis(scores.candidates[name], order, axis=1) @ chance

    if not scores.has_events:
        return _weighted_mean(expected("log_mel_distance"), weights)
    matched, detected = expected("num_matched_class"), expected("num_detected")
    return _micro_f1(matched, detected, scores.values["num_events"], weights)
