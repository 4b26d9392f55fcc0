"""One clip -> its score row: the sounds of the subject, the reward of each, and measures that know no network."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from models.codec import Codec
from models.policy import Policy
from models.reward import Reward, RewardScore, refused
from models.spec import ClipSpec
from pipelines.data.clip_units import ClipReader, Place
from pipelines.data.contracts import SCORES
from pipelines.data.demo_world import Event
from pipelines.data.frames import decode_frames
from pipelines.data.media_write import decode_flac, encode_flac
from pipelines.data.store import Dataset
from pipelines.data.units import Alive, Unit
from pipelines.evaluation.detector import BANDS, MatchCounts, detect, match
from pipelines.evaluation.detector import SAMPLE_RATE_HZ as DETECTOR_RATE_HZ
from pipelines.evaluation.metrics import MelMeasure, audio_statistics, diversity, log_mel_distance
from pipelines.evaluation.real_data_loss import real_data_loss
from pipelines.evaluation.subjects import EVALUATION_ROUND, EvaluationSettings
from pipelines.preferences.candidates import ConditionRow, candidate_seeds, sample_candidates
from pipelines.preferences.ranking import NONFINITE, Ranker, reward_struct

STAGE = "evaluate"
CONDITIONS = ("clip_features", "sync_features", "text_features")
NO_REWARD = {"total": None, "semantic": None, "temporal": None}
COLUMNS = ("clip_id", "source", "split", "events", "frames", "audio", "latent_mean", *CONDITIONS)


class ClipMeasurer:
    """Measures one clip a call, with a policy (where the subject samples), a reward and a codec that it holds."""

    def __init__(
        self,
        *,
        policy: Policy | None,
        reward: Reward,
        codec: Codec,
        spec: ClipSpec,
        settings: EvaluationSettings,
        device: torch.device,
    ) -> None:
        self._policy = policy
        self._reward = reward
        self._codec = codec
        self._spec = spec
        self._settings = settings
        self._ranker = Ranker(reward, codec, spec.sample_rate_hz, device)
        self._device = device
        self._mel = MelMeasure(spec.name)

    def row(self, clip: dict[str, Any], conditions: ConditionRow) -> dict[str, Any]:
        """A features row, and the conditions that the policy is given -> a row of the scores contract.

        Raises MediaError where the clip's own frames or sound cannot be read.
        """
        rate_hz = self._spec.sample_rate_hz
        truth = decode_flac(clip["audio"])
        seeds, waves, finite = self._sounds(clip, truth, conditions)
        rewards = self._rewards(clip["frames"], waves, finite)
        events = known_events(clip["events"], rate_hz)
        pictures, truth_picture = self._mel.picture(waves), self._mel.picture(truth)
        candidates = [
            {
                "seed": seed,
                **(reward_struct(reward) or NO_REWARD),
                **_counts(wave, rate_hz, events),
                "mel_distance": log_mel_distance(picture, truth_picture),
            }
            for seed, wave, picture, reward in zip(seeds, waves, pictures, rewards, strict=True)
        ]
        own, reward = candidates[0], rewards[0]
        return {
            "clip_id": clip["clip_id"],
            "split": clip["split"],
            "seed": seeds[0],
            "reward": reward_struct(reward),
            "offset_s": reward.offset_s if reward.valid and math.isfinite(reward.offset_s) else None,
            "invalid_reason": None if reward.valid else reward.invalid_reason,
            "num_events": None if events is None else len(events),
            **{name: own[name] for name in ("num_detected", "num_matched", "num_class_matched", "mel_distance")},
            "statistics": audio_statistics(pictures[0]),
            "truth_statistics": audio_statistics(truth_picture),
            "diversity": diversity(pictures) if len(pictures) > 1 else None,
            "fm_loss": self._real_data_loss(clip, conditions),
            "candidates": candidates,
            "audio": encode_flac(waves[0], rate_hz),
        }

    def _sounds(
        self, clip: dict[str, Any], truth: np.ndarray, conditions: ConditionRow
    ) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Seeds [n], waves float32 [n, S] and whether each came out finite; a sound that did not is silence."""
        settings = self._settings
        if settings.subject == "ground_truth":
            return [0], truth[None], np.array([True])
        if self._policy is None:
            seeds, latents = [0], torch.from_numpy(np.array(clip["latent_mean"]))[None]
        else:
            seeds = candidate_seeds(settings.seed, clip["clip_id"], EVALUATION_ROUND, settings.num_candidates)
            latents = sample_candidates(self._policy, conditions, seeds, settings.sampling)
        finite = torch.isfinite(latents).all(dim=2).all(dim=1)
        waves = np.zeros((len(seeds), self._spec.num_samples), np.float32)
        if finite.any():
            waves[finite.numpy()] = self._codec.decode(latents[finite].to(self._device)).cpu().numpy()
        return seeds, waves, finite.numpy()

    def _real_data_loss(self, clip: dict[str, Any], conditions: ConditionRow) -> float | None:
        if self._policy is None:
            return None
        truth = torch.from_numpy(np.array(clip["latent_mean"]))
        loss = real_data_loss(self._policy, conditions, truth, seed=self._settings.seed, clip_id=clip["clip_id"])
        return loss if math.isfinite(loss) else None

    def _rewards(self, frames: Sequence[bytes], waves: np.ndarray, finite: np.ndarray) -> list[RewardScore]:
        video = self._ranker.look(decode_frames(frames))
        found = self._reward.score(video, torch.from_numpy(waves).to(self._device), self._spec.sample_rate_hz)
        return [score if good else refused(NONFINITE) for score, good in zip(found, finite, strict=True)]


def known_events(events: list[dict[str, Any]] | None, rate_hz: int) -> list[Event] | None:
    """The clip's events where the detector can hear their kinds at this rate, else None."""
    if events is None or rate_hz != DETECTOR_RATE_HZ or not {e["kind"] for e in events} <= {b.kind for b in BANDS}:
        return None
    return [Event(**event) for event in events]


def _counts(wave: np.ndarray, rate_hz: int, events: list[Event] | None) -> dict[str, int | None]:
    if events is None:
        return {"num_detected": None, "num_matched": None, "num_class_matched": None}
    counts: MatchCounts = match(detect(wave, rate_hz), events)
    return {
        "num_detected": counts.num_detected,
        "num_matched": counts.num_matched,
        "num_class_matched": counts.num_class_matched,
    }


class EvaluationWorker:
    """Turns units of clip ids into score rows, reading each clip from its row group."""

    def __init__(self, features: Dataset, measurer: ClipMeasurer) -> None:
        self._reader = ClipReader(features)
        self._measurer = measurer

    def process(self, unit: Unit, alive: Alive) -> tuple[pa.Table, pa.Table]:
        """Score rows of the unit's clips, and rejects for those whose stored media cannot be read."""
        return self._reader.rows_and_rejects(unit, COLUMNS, self._row, contract=SCORES, stage=STAGE, alive=alive)

    def close(self) -> None:
        """Nothing to end."""

    def _row(self, wanted: dict[str, Any], clip: dict[str, Any]) -> dict[str, Any]:
        return self._measurer.row(clip, self._conditions(wanted, clip))

    def _conditions(self, wanted: dict[str, Any], clip: dict[str, Any]) -> ConditionRow:
        """The clip's own conditions, or those of the clip that the plan names as donor."""
        giver = clip
        if "donor_clip_id" in wanted:
            donor, place = wanted["donor_clip_id"], Place(wanted["donor_part"], wanted["donor_row_group"])
            giver = self._reader.read(place, {donor}, ("clip_id", *CONDITIONS))[donor]
        return ConditionRow(**{name: giver[name] for name in CONDITIONS})
