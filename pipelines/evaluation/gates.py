"""The acceptance gates of a reward: may it rank sounds, before any preference round uses it.

Pure functions of embeddings and scores, and `measure`, which fills them in from held-out real pairs. The two gates that
need a policy's candidates (rank correlation inside a clip, Best-of-N) are in `ranking_quality`, since they are
measured where the candidates are.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.reward import Reward, VideoFeatures, invalid_reason
from models.sf_cavp import Streams

GROUP_SIZE = 32
"""Clips among which one is to be found again: R@1 among 32. Found by R, and by its semantic part alone."""
SHIFTS_S = (0.125, 0.25, 0.5)
GAINS_DB = (-6.0, 6.0)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Share of clips whose partner scores best, or among the ten best, of a group."""

    video_to_audio_r1: float
    audio_to_video_r1: float
    video_to_audio_r10: float
    audio_to_video_r10: float
    group_size: int


def retrieval(groups: Sequence[np.ndarray]) -> Retrieval:
    """Retrieve inside groups by their scores [g, g], pictures x sounds, the partners on the diagonal.

    A tie counts as not found.
    """
    ranks: list[tuple[int, int]] = []
    for scores in groups:
        own = np.diagonal(scores)
        # Places taken by others that score at least as high: 0 is found at once.
        to_audio = (scores >= own[:, None]).sum(axis=1) - 1
        to_video = (scores >= own[None]).sum(axis=0) - 1
        ranks += list(zip(to_audio.tolist(), to_video.tolist(), strict=True))
    table = np.array(ranks)
    r1, r10 = (table < 1).mean(axis=0), (table < 10).mean(axis=0)
    return Retrieval(
        video_to_audio_r1=float(r1[0]),
        audio_to_video_r1=float(r1[1]),
        video_to_audio_r10=float(r10[0]),
        audio_to_video_r10=float(r10[1]),
        group_size=len(groups[0]),
    )


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive score [n] exceeds a negative one [m], ties counted half (Mann-Whitney)."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    return float((below + not_above).mean() / (2 * len(ordered)))


def preferred_share(real: np.ndarray, wrong: np.ndarray) -> float:
    """Share of clips whose real sound [n] scores above its own wrong version [n], ties counted half."""
    return float(((real > wrong) + 0.5 * (real == wrong)).mean())


def ground_truth_shares(ground_truth: np.ndarray, candidates: np.ndarray) -> tuple[float, float]:
    """Share of clips whose real sound [n] scores above the worst and above the best of its candidates [n, N].

    Candidates without a score (NaN) are left out; a clip without any counts in neither.
    """
    known = np.isfinite(candidates).any(axis=1) & np.isfinite(ground_truth)
    if not known.any():
        return math.nan, math.nan
    truth, others = ground_truth[known], candidates[known]
    return (
        float((truth > np.nanmin(others, axis=1)).mean()),
        float((truth > np.nanmax(others, axis=1)).mean()),
    )


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One measurement with the bar it has to reach (None: reported only)."""

    name: str
    value: float
    bar: float | None
    at_most: bool = False
    """Whether the bar is an upper one."""

    @property
    def passed(self) -> bool:
        """Whether the bar is reached; a value that is not known passes no bar."""
        if self.bar is None:
            return True
        return self.value <= self.bar if self.at_most else self.value >= self.bar


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """All gates measured on one set of held-out real pairs."""

    num_clips: int
    num_unusable: int
    """Clips left out since their sound is silent, clipped or not finite."""
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate with a bar passed."""
        return all(gate.passed for gate in self.gates)

    def value(self, name: str) -> float:
        """Return one gate's value."""
        return next(gate.value for gate in self.gates if gate.name == name)

    def to_json(self) -> dict[str, object]:
        """Return name -> value, bar and verdict."""
        return {
            "num_clips": self.num_clips,
            "num_unusable": self.num_unusable,
            "passed": self.passed,
            "gates": {g.name: {"value": g.value, "bar": g.bar, "passed": g.passed} for g in self.gates},
        }


@dataclass(frozen=True)
class _Clip:
    video: VideoFeatures
    sound: Streams
    wave: Tensor
    rate_hz: int
    real: float


def measure(reward: Reward, pairs: Iterable[tuple[Tensor, Tensor, int]]) -> GateReport:
    """Measure the gates on held-out real pairs (frames [1, T, 3, H, W] in [0, 1], wave [1, S], rate in Hz).

    All clips are of one duration. ValueError if fewer than two have usable sound.
    """
    clips, num_unusable = _look(reward, pairs)
    if len(clips) < 2:
        raise ValueError(f"the gates need at least 2 clips with usable sound, got {len(clips)}")
    real = np.array([clip.real for clip in clips])
    wrong = [_altered(reward, clip, other) for clip, other in zip(clips, [*clips[1:], clips[0]], strict=True)]
    mismatched = np.array([scores.mismatched for scores in wrong])
    by_shift = {shift_s: np.array([scores.shifted[shift_s] for scores in wrong]) for shift_s in SHIFTS_S}
    groups = [_cross_scores(reward, group) for group in _groups(clips)]
    found = retrieval([total for total, _ in groups])
    by_semantics = retrieval([semantic for _, semantic in groups])
    gain_change = max(
        abs(total - clip.real) for clip, scores in zip(clips, wrong, strict=True) for total in scores.gained
    )
    gates = [
        Gate(name="r1_v2a", value=found.video_to_audio_r1, bar=0.85),
        Gate(name="r1_a2v", value=found.audio_to_video_r1, bar=0.85),
        Gate(name="r10_v2a", value=found.video_to_audio_r10, bar=None),
        Gate(name="r10_a2v", value=found.audio_to_video_r10, bar=None),
        Gate(name="r1_v2a_semantic", value=by_semantics.video_to_audio_r1, bar=None),
        Gate(name="r1_a2v_semantic", value=by_semantics.audio_to_video_r1, bar=None),
        Gate(name="auc_mismatched", value=auc(real, mismatched), bar=0.90),
        Gate(name="auc_shift_500ms", value=auc(np.repeat(real, 2), by_shift[0.5].ravel()), bar=0.70),
        *(
            Gate(
                name=f"shift_acc_{1000 * shift_s:.0f}ms",
                value=preferred_share(np.stack([real, real], axis=1), moved),
                bar=0.95 if shift_s >= 0.125 else None,
            )
            for shift_s, moved in by_shift.items()
        ),
        Gate(name="gain_change", value=gain_change, bar=0.01, at_most=True),
    ]
    return GateReport(num_clips=len(clips), num_unusable=num_unusable, gates=tuple(gates))


def _look(reward: Reward, pairs: Iterable[tuple[Tensor, Tensor, int]]) -> tuple[list[_Clip], int]:
    clips: list[_Clip] = []
    num_unusable = 0
    for frames, wave, rate_hz in pairs:
        if invalid_reason(wave[0]) is not None:
            num_unusable += 1
            continue
        video = reward.video_features(frames)
        sound = reward.sound_features(wave, rate_hz, video)
        parts = reward.compare(video, sound)
        real = float(reward.calibration.total(parts.semantic, parts.temporal).mean())
        clips.append(_Clip(video, sound, wave, rate_hz, real))
    return clips, num_unusable


def _groups(clips: list[_Clip]) -> list[list[_Clip]]:
    """Cut into groups of `GROUP_SIZE` clips; an incomplete last one is left out unless it is the only one."""
    size = min(GROUP_SIZE, len(clips))
    return [clips[start : start + size] for start in range(0, len(clips) - size + 1, size)]


def _cross_scores(reward: Reward, group: list[_Clip]) -> tuple[np.ndarray, np.ndarray]:
    """R and its semantic part of every picture with every sound of a group, [g, g] each."""
    sounds = Streams(*(torch.cat(streams) for streams in zip(*(clip.sound for clip in group), strict=True)))
    totals, semantics = [], []
    for clip in group:
        parts = reward.compare(clip.video, sounds)
        totals.append(reward.calibration.total(parts.semantic, parts.temporal).mean(dim=1).cpu().numpy())
        semantics.append(parts.semantic.mean(dim=1).cpu().numpy())
    return np.stack(totals), np.stack(semantics)


@dataclass(frozen=True)
class _Altered:
    """R of a clip's picture with other sounds than its own."""

    mismatched: float
    """Another clip's."""
    shifted: dict[float, list[float]]
    """Its own, by seconds: late and early. Rolled in a circle, so that no silence gives the shift away."""
    gained: list[float]
    """Its own, louder and softer, where that does not clip."""


def _altered(reward: Reward, clip: _Clip, other: _Clip) -> _Altered:
    shifts = [sign * round(shift_s * clip.rate_hz) for shift_s in SHIFTS_S for sign in (1, -1)]
    gains = [10 ** (gain_db / 20) for gain_db in GAINS_DB]
    gains = [gain for gain in gains if float(clip.wave.abs().max()) * gain < 1]
    waves = [other.wave, *(torch.roll(clip.wave, shift, dims=1) for shift in shifts), *(clip.wave * g for g in gains)]
    # One call for all: encoding them one by one takes several times as long.
    mismatched, *totals = [score.total for score in reward.score(clip.video, torch.cat(waves), clip.rate_hz)]
    shifted = {shift_s: totals[2 * i : 2 * i + 2] for i, shift_s in enumerate(SHIFTS_S)}
    return _Altered(mismatched, shifted, totals[len(shifts) :])
