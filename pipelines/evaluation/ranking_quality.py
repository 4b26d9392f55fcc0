"""Can the reward rank candidates of the SAME clip: rank correlation with an independent score, and Best-of-N."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.evaluation.bootstrap import Estimate, estimate, micro_f1, resampling_weights, weighted_mean
from pipelines.evaluation.scores import ClipScores


def independent_score(scores: ClipScores) -> np.ndarray:
    """A score of each candidate that shares nothing with the reward, higher is better: [clips, N].

    The clip's class-aware onset F1 where there are known events, else minus the log-mel distance to the truth.
    """
    if not scores.has_events:
        return -scores.candidates["mel_distance"]
    c = scores.candidates
    possible = c["num_detected"] + scores.values["num_events"][:, None]
    return np.where(possible > 0, 2 * c["num_class_matched"] / np.where(possible > 0, possible, 1.0), 0.0)


def first_candidate_score(scores: ClipScores) -> np.ndarray:
    """The independent score of each row's own sound: [clips]."""
    return independent_score(scores)[:, 0]


def within_clip_correlation(scores: ClipScores) -> np.ndarray:
    """Spearman's rho of reward and independent score among each clip's candidates: [clips].

    NaN where it is not defined: fewer than two valid candidates, or one of the two is the same for all of them.
    """
    # Here, because scipy.stats takes over a second to import and every sampling actor imports this module.
    from scipy.stats import rankdata

    reward, score = scores.candidates["total"], independent_score(scores)
    result = np.full(scores.num_clips, np.nan)
    for i in range(scores.num_clips):
        valid = np.isfinite(reward[i]) & np.isfinite(score[i])
        a, b = rankdata(reward[i, valid]), rankdata(score[i, valid])
        if len(a) > 1 and a.std() > 0 and b.std() > 0:
            result[i] = np.corrcoef(a, b)[0, 1]
    return result


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """The independent score of the best of n candidates, picked by the reward and picked by the score itself."""

    score: Literal["class_f1", "mel_distance"]
    picked: dict[int, Estimate]
    oracle: dict[int, Estimate]

    def to_json(self) -> dict[str, object]:
        """`bon_<n>` and `oracle_<n>` with their intervals, and what the score is."""
        flat: dict[str, object] = {"score": self.score}
        for prefix, curve in (("bon", self.picked), ("oracle", self.oracle)):
            for n, point in curve.items():
                flat |= {f"{prefix}_{n}": point.value, f"{prefix}_{n}_lo": point.lo, f"{prefix}_{n}_hi": point.hi}
        return flat


def best_of_n(scores: ClipScores, *, num_resamples: int = 1000, seed: int = 0) -> BestOfN:
    """The Best-of-N curve for every n up to the number of candidates.

    The expectation over ALL subsets of n candidates, in closed form: the candidate of rank r (0 = best) among N is
    the best of a random n-subset with probability C(N-1-r, n-1) / C(N, n). With events the score is the
    class-aware F1 micro-averaged over clips (of expected counts), so that `picked[1]` is what the model itself has.
    A candidate that the reward refuses ranks last.
    """
    num_candidates = scores.num_candidates
    weights = resampling_weights(scores.num_clips, num_resamples, seed)
    reward = np.where(np.isfinite(scores.candidates["total"]), scores.candidates["total"], -np.inf)
    oracle_key = np.nan_to_num(independent_score(scores), nan=-np.inf)
    curves: list[dict[int, Estimate]] = []
    for key in (reward, oracle_key):
        order = np.argsort(-key, axis=1, kind="stable")
        curve = {}
        for n in range(1, num_candidates + 1):
            ways = [math.comb(num_candidates - 1 - r, n - 1) for r in range(num_candidates)]
            chance = np.array(ways) / math.comb(num_candidates, n)
            curve[n] = estimate(_expected_score(scores, order, chance, weights))
        curves.append(curve)
    kind = "class_f1" if scores.has_events else "mel_distance"
    return BestOfN(score=kind, picked=curves[0], oracle=curves[1])


def _expected_score(scores: ClipScores, order: np.ndarray, chance: np.ndarray, weights: np.ndarray) -> np.ndarray:
    def expected(name: str) -> np.ndarray:
        return np.take_along_axis(scores.candidates[name], order, axis=1) @ chance

    if not scores.has_events:
        return weighted_mean(expected("mel_distance"), weights)
    matched, detected = expected("num_class_matched"), expected("num_detected")
    return micro_f1(matched, detected, scores.values["num_events"], weights)
