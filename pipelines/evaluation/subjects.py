"""What is evaluated: a policy, or a control that shows what the measures mean.

`shuffled` gives the policy the conditions of another clip and keeps everything else; `ground_truth` is the recorded
sound; `inverted` is the recorded sound after the codec, the best that any policy on this codec could reach.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipelines.data.store import Dataset
from pipelines.data.units import Unit, unit_id
from pipelines.errors import InputError
from pipelines.preferences.candidates import Sampling
from pipelines.preferences.pairs import stable_seed

Subject = Literal["policy", "shuffled", "ground_truth", "inverted"]
ROWS_PER_UNIT = 16
"""Clips committed together: what a kill can cost a worker, and the grain of sharing among workers."""
EVALUATION_ROUND = -1
"""Takes the place of a round in the seeds, so that no evaluation shares noise with a round of preferences."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How a subject is evaluated; every field affects the rows."""

    subject: Subject
    split: str
    seed: int
    num_candidates: int
    sampling: Sampling
    max_clips: int | None

    def __post_init__(self) -> None:
        if self.num_candidates < 1 or self.sampling.num_steps < 1:
            raise InputError("--num-candidates and --num-steps must be at least 1")
        if self.max_clips is not None and self.max_clips < 1:
            raise InputError("--max-clips must be at least 1")
        if self.num_candidates > 1 and not self.needs_policy:
            raise InputError(f"--subject {self.subject} is one sound a clip; leave --num-candidates at 1")

    @property
    def needs_policy(self) -> bool:
        """Whether sounds are sampled."""
        return self.subject in ("policy", "shuffled")

    def affecting_bytes(self) -> dict[str, Any]:
        """The fields as JSON values, for the fingerprint; those of the sampler only where there is one."""
        values = {"subject": self.subject, "split": self.split, "max_clips": self.max_clips}
        if self.max_clips is not None or self.needs_policy:
            values["seed"] = self.seed
        if self.needs_policy:
            values |= {"num_candidates": self.num_candidates, "sampling": vars(self.sampling)}
        return values


def plan_units(features: Dataset, settings: EvaluationSettings) -> list[Unit]:
    """Cut the clips of the split into units, none across a row group; a function of dataset and settings alone.

    Every row says where its clip lies and where the clip lies whose conditions it is given.

    Raises:
        InputError: the split has no clips, or a single one where conditions are to be shuffled.
    """
    groups = {
        (part.path, index): features.read_row_group(part, index, ["clip_id"])["clip_id"].to_pylist()
        for part in features.parts
        if part.split == settings.split
        for index in range(len(part.row_groups))
    }
    every = [clip_id for members in groups.values() for clip_id in members]
    if not every:
        raise InputError(
            f"{features.folder.uri} has no clips of split '{settings.split}'; it has {features.splits or 'no rows'}"
        )
    if settings.subject == "shuffled" and len(every) < 2:
        raise InputError(f"split '{settings.split}' has one clip: there are no other conditions to give it")
    donors = _donors(groups, settings.seed)
    chosen = _sample_clips(every, settings)
    units: list[Unit] = []
    for (path, index), group in groups.items():
        clip_ids = sorted(chosen.intersection(group))
        for start in range(0, len(clip_ids), ROWS_PER_UNIT):
            members = clip_ids[start : start + ROWS_PER_UNIT]
            rows = tuple(
                {"clip_id": clip_id, "part": path, "row_group": index}
                | (donors[clip_id] if settings.subject == "shuffled" else {})
                for clip_id in members
            )
            units.append(Unit(unit_id=unit_id(settings.split, len(units), members), split=settings.split, rows=rows))
    return units


def _sample_clips(clip_ids: list[str], settings: EvaluationSettings) -> set[str]:
    if settings.max_clips is None:
        return set(clip_ids)
    lots = {clip_id: stable_seed(settings.seed, "evaluated", clip_id) for clip_id in clip_ids}
    return set(sorted(clip_ids, key=lots.__getitem__)[: settings.max_clips])


def _donors(groups: dict[tuple[str, int], list[str]], seed: int) -> dict[str, dict[str, Any]]:
    """For each clip another one whose conditions it gets: a seeded derangement inside its row group.

    Inside, so that a worker reads one row group; a group of one clip borrows from a neighbouring group.
    """
    donors: dict[str, dict[str, Any]] = {}
    places = list(groups)
    for number, (place, members) in enumerate(groups.items()):
        if len(members) == 1:
            place = places[number - 1]
            givers = [groups[place][0]]
        else:
            givers = derangement(members, stable_seed(seed, "shuffle", *place))
        for clip_id, giver in zip(members, givers, strict=True):
            donors[clip_id] = {"donor_clip_id": giver, "donor_part": place[0], "donor_row_group": place[1]}
    return donors


def derangement(members: list[str], seed: int) -> list[str]:
    """The members permuted in one random cycle (Sattolo's algorithm): no member stays in its place."""
    permuted = list(members)
    rng = np.random.default_rng(seed)
    for i in range(len(permuted) - 1, 0, -1):
        j = int(rng.integers(i))
        permuted[i], permuted[j] = permuted[j], permuted[i]
    return permuted
