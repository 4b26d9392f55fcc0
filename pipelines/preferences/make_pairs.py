"""One clip's features -> N candidates of M_k -> scores -> a pair row; and the stage that does it for a split.

The row keeps every candidate's score and seed, so any other choice could be made again from the dataset; latents are
kept of the two chosen sounds only. A clip whose pair is dropped stays in the dataset with its reason and `kept` false.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.policy import Policy
from models.reward import RewardScore
from models.spec import ClipSpec
from pipelines.data.clip_units import ClipReader, sampled_units
from pipelines.data.contracts import PAIRS
from pipelines.data.frames import decode_frames
from pipelines.data.store import Dataset
from pipelines.data.units import Alive, Unit
from pipelines.errors import InputError
from pipelines.preferences.candidates import ConditionRow, Sampling, candidate_seeds, sample_candidates
from pipelines.preferences.distortions import distort
from pipelines.preferences.pairs import (
    GROUND_TRUTH,
    TWO_CANDIDATES,
    Choice,
    PairMode,
    choose,
    parse_mixture,
    pick_mode,
    stable_seed,
)
from pipelines.preferences.ranking import Ranker, as_contenders, reward_struct

STAGE = "generate_preferences"
COLUMNS = ("clip_id", "source", "frames", "clip_features", "sync_features", "text_features", "latent_mean")
NO_SOUND = "none"
"""Origin of winner and loser where no pair could be formed; its latents are zeros."""


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """How pairs are made; every field affects the rows."""

    mode: PairMode
    mixture: tuple[str, ...]
    margin: float
    num_candidates: int
    sampling: Sampling
    seed: int
    round_index: int
    max_clips: int | None

    def __post_init__(self) -> None:
        if self.num_candidates < (2 if self.mode in TWO_CANDIDATES else 1):
            raise InputError(f"--num-candidates must be at least 1, and at least 2 for {' and '.join(TWO_CANDIDATES)}")
        if not 0 <= self.margin < float("inf"):
            raise InputError(f"--margin must be a number from 0 on, got {self.margin}")
        if self.sampling.num_steps < 1 or (self.max_clips is not None and self.max_clips < 1):
            raise InputError("--num-steps and --max-clips must be at least 1")
        if self.mode == "mixed":
            parse_mixture(self.mixture)

    def affecting_bytes(self) -> dict[str, Any]:
        """The fields as JSON values, for the fingerprint; the mixture only where it is used."""
        values = {**vars(self), "sampling": vars(self.sampling), "mixture": list(self.mixture)}
        return values if self.mode == "mixed" else {**values, "mixture": []}

    def mode_of(self, clip_id: str) -> PairMode:
        """The mode of one clip's pair: drawn for `mixed`, else the same for all."""
        if self.mode != "mixed":
            return self.mode
        return pick_mode(parse_mixture(self.mixture), self._rng(clip_id, "mode"))

    def choice_rng(self, clip_id: str) -> random.Random:
        """What the random modes draw from."""
        return self._rng(clip_id, "choice")

    def distortion_generator(self, clip_id: str) -> torch.Generator:
        """What `gt_vs_distorted` draws from."""
        seed = stable_seed(self.seed, clip_id, self.round_index, "distortion")
        return torch.Generator().manual_seed(seed)

    def _rng(self, clip_id: str, purpose: str) -> random.Random:
        return random.Random(stable_seed(self.seed, clip_id, self.round_index, purpose))


def plan_units(features: Dataset, split: str, settings: PairSettings) -> list[Unit]:
    """Cut the clips of a split into units; a function of dataset and settings alone.

    With `max_clips` a seeded sample is taken, another one each round.
    """
    return sampled_units(
        features,
        split,
        settings.max_clips,
        lambda clip_id: stable_seed(settings.seed, "clips", settings.round_index, clip_id),
    )


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A clip's sounds, their scores, and the pair they make."""

    choice: Choice
    latents: dict[str, np.ndarray]
    """By origin, float32 [N, C]."""
    truth_score: RewardScore
    candidate_scores: list[RewardScore]
    """Of the policy's candidates; empty for a distorted ground truth."""
    seeds: list[int]


class PairMaker:
    """Makes the row of one clip after another, from a policy and a ranker that it holds."""

    def __init__(self, policy: Policy, ranker: Ranker, spec: ClipSpec, settings: PairSettings) -> None:
        self._policy = policy
        self._ranker = ranker
        self._spec = spec
        self._settings = settings

    def row(self, clip: dict[str, Any]) -> dict[str, Any]:
        """A features row as `ClipReader` gives it -> the pair's columns but its lineage.

        Raises MediaError where the clip itself cannot be used.
        """
        judged = self._judge(clip)
        choice = judged.choice
        winner, loser = choice.winner, choice.loser
        silence = np.zeros_like(clip["latent_mean"])
        return {
            "clip_id": clip["clip_id"],
            "clip_features": clip["clip_features"],
            "sync_features": clip["sync_features"],
            "text_features": clip["text_features"],
            "winner": silence if winner is None else judged.latents[winner.origin],
            "loser": silence if loser is None else judged.latents[loser.origin],
            "winner_origin": NO_SOUND if winner is None else winner.origin,
            "loser_origin": NO_SOUND if loser is None else loser.origin,
            "rewards": [reward_struct(score) for score in judged.candidate_scores],
            "reward_ground_truth": reward_struct(judged.truth_score),
            "seeds": judged.seeds,
            "margin": choice.margin,
            "kept": choice.kept,
            "drop_reason": choice.drop_reason,
        }

    def _judge(self, clip: dict[str, Any]) -> _Judged:
        settings, clip_id = self._settings, clip["clip_id"]
        mode = settings.mode_of(clip_id)
        truth = torch.from_numpy(clip["latent_mean"])
        origins, sounds, seeds = self._opponents(clip, truth, mode)
        video = self._ranker.look(decode_frames(clip["frames"]))
        # In one call: the codec and the reward take hardly longer for one sound more.
        truth_score, *scores = self._ranker.score(video, torch.cat([truth[None], sounds]))
        choice = choose(
            mode,
            as_contenders([GROUND_TRUTH], [truth_score], truth[None])[0],
            as_contenders(origins, scores, sounds),
            settings.margin,
            settings.choice_rng(clip_id),
        )
        return _Judged(
            choice=choice,
            latents={GROUND_TRUTH: truth.numpy(), **dict(zip(origins, sounds.numpy(), strict=True))},
            truth_score=truth_score,
            candidate_scores=scores if seeds else [],
            seeds=seeds,
        )

    def _opponents(self, clip: dict[str, Any], truth: Tensor, mode: PairMode) -> tuple[list[str], Tensor, list[int]]:
        """Origins, latents [n, N, C] and seeds of the sounds that stand against the ground truth or each other."""
        settings, clip_id = self._settings, clip["clip_id"]
        if mode == "gt_vs_distorted":
            how, sound = distort(truth, self._spec.duration_s, settings.distortion_generator(clip_id))
            return [f"distorted_{how}"], sound[None], []
        seeds = candidate_seeds(settings.seed, clip_id, settings.round_index, settings.num_candidates)
        conditions = ConditionRow(
            clip_features=clip["clip_features"],
            sync_features=clip["sync_features"],
            text_features=clip["text_features"],
        )
        sounds = sample_candidates(self._policy, conditions, seeds, settings.sampling)
        return [f"candidate_{index}" for index in range(len(seeds))], sounds, seeds


class PairWorker:
    """Pairs of a unit's clips, one clip a call; a clip that cannot be used becomes a reject."""

    def __init__(self, maker: PairMaker, features: Dataset, lineage: dict[str, Any]) -> None:
        """`lineage` holds the columns policy, reward_model and round."""
        self._maker = maker
        self._reader = ClipReader(features)
        self._lineage = lineage

    def process(self, unit: Unit, alive: Alive) -> tuple[pa.Table, pa.Table]:
        """Rows and rejects of the unit; see `pipelines.data.units.UnitWorker`."""
        return self._reader.rows_and_rejects(unit, COLUMNS, self._row, contract=PAIRS, stage=STAGE, alive=alive)

    def close(self) -> None:
        """Nothing to end."""

    def _row(self, wanted: dict[str, Any], clip: dict[str, Any]) -> dict[str, Any]:
        return {**self._maker.row(clip), **self._lineage}
