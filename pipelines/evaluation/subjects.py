"""What is evaluated: a policy, or a control that shows what the measures mean.

`shuffled` gives the policy the conditions of another clip and keeps everything else; `ground_truth` is the recorded
sound; `inverted` is the recorded sound after the codec, the best that any policy on this codec could reach.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipelines.data.clip_units import Place, clip_places, cut_places, draw_clips
from pipelines.data.store import Dataset
from pipelines.data.units import Unit
from pipelines.errors import InputError
from pipelines.preferences.candidates import Sampling
from pipelines.preferences.pairs import stable_seed

Subject = Literal["policy", "shuffled", "ground_truth", "inverted"]
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
    """Cut the clips of the split into units; a function of dataset and settings alone.

    For `shuffled` every row also says where the clip lies whose conditions it is given.

    Raises:
        InputError: the split has no clips, or a single one where conditions are to be shuffled.
    """
    places = clip_places(features, settings.split)
    every = [clip_id for members in places.values() for clip_id in members]
    if not every:
        raise InputError(
            f"{features.folder.uri} has no clips of split '{settings.split}'; it has {features.splits or 'no rows'}"
        )
    if settings.subject == "shuffled" and len(every) < 2:
        raise InputError(f"split '{settings.split}' has one clip: there are no other conditions to give it")
    chosen = draw_clips(every, settings.max_clips, lambda clip_id: stable_seed(settings.seed, "evaluated", clip_id))
    donors = _donors(places, settings.seed) if settings.subject == "shuffled" else {}
    return cut_places(places, chosen, settings.split, donors)


def _donors(groups: dict[Place, list[str]], seed: int) -> dict[str, dict[str, Any]]:
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
            givers = derangement(members, stable_seed(seed, "shuffle", place.part, place.row_group))
        for clip_id, giver in zip(members, givers, strict=True):
            donors[clip_id] = {
                "donor_clip_id": giver,
                "donor_part": place.part,
                "donor_row_group": place.row_group,
            }
    return donors


def derangement(members: list[str], seed: int) -> list[str]:
    """The members permuted in one random cycle (Sattolo's algorithm): no member stays in its place."""
    permuted = list(members)
    rng = np.random.default_rng(seed)
    for i in range(len(permuted) - 1, 0, -1):
        j = int(rng.integers(i))
        permuted[i], permuted[j] = permuted[j], permuted[i]
    return permuted
