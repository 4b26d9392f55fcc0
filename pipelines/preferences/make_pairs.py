"""One clip's features -> N candidates of M_k -> scores -> a pair row; and the stage that does it for a split.

The row keeps every candidate's score and seed, so any other choice could be made again from the dataset; latents are
kept of the two chosen sounds only. A clip whose pair is dropped stays in the dataset with its reason and `kept` false.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.reward import RewardScore
from models.spec import ClipSpec
from pipelines.data.contracts import FEATURES, PAIRS, REJECTS, column_to_numpy, table_from_rows
from pipelines.data.store import Dataset
from pipelines.data.units import Unit, unit_id
from pipelines.errors import InputError, MediaError
from pipelines.preferences.candidates import ConditionRow, Sampling, candidate_seeds, sample_candidates
from pipelines.preferences.distortions import distort
from pipelines.preferences.pairs import (
    GROUND_TRUTH,
    Choice,
    PairMode,
    choose,
    parse_mixture,
    pick_mode,
    stable_seed,
)
from pipelines.preferences.ranking import Ranker, as_contenders, reward_struct

STAGE = "generate_preferences"
ROWS_PER_UNIT = 16
"""Clips committed together: what a kill can cost a worker, and the grain of sharing among workers."""
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
        if self.num_candidates < (2 if self.mode == "best_vs_worst" else 1):
            raise InputError("--num-candidates must be at least 1, and at least 2 for best_vs_worst")
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
        """What `gt_vs_random` draws from."""
        return self._rng(clip_id, "choice")

    def distortion_generator(self, clip_id: str) -> torch.Generator:
        """What `gt_vs_distorted` draws from."""
        seed = stable_seed(self.seed, clip_id, self.round_index, "distortion")
        return torch.Generator().manual_seed(seed)

    def _rng(self, clip_id: str, purpose: str) -> random.Random:
        return random.Random(stable_seed(self.seed, clip_id, self.round_index, purpose))


def plan_units(features: Dataset, split: str, settings: PairSettings) -> list[Unit]:
    """Cut the clips of a split into units, none across a row group; a function of dataset and settings alone.

    With `max_clips` a seeded sample is taken, another one each round.
    """
    found = [(part, group) for part in features.parts if part.split == split for group in range(len(part.row_groups))]
    places = [
        (clip_id, part.path, group)
        for part, group in found
        for clip_id in features.read_row_group(part, group, ["clip_id"])["clip_id"].to_pylist()
    ]
    if settings.max_clips is not None and settings.max_clips < len(places):
        by_lot = sorted(places, key=lambda p: stable_seed(settings.seed, "clips", settings.round_index, p[0]))
        chosen = {clip_id for clip_id, _, _ in by_lot[: settings.max_clips]}
        places = [place for place in places if place[0] in chosen]
    units = []
    for part, group in found:
        clip_ids = sorted(c for c, path, index in places if (path, index) == (part.path, group))
        for start in range(0, len(clip_ids), ROWS_PER_UNIT):
            members = clip_ids[start : start + ROWS_PER_UNIT]
            rows = tuple({"clip_id": clip_id, "part": part.path, "row_group": group} for clip_id in members)
            units.append(Unit(unit_id=unit_id(split, len(units), members), split=split, rows=rows))
    return units
