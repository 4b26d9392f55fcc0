"""What a controlled study of preference rounds compares, as written in YAML: a world, seeds, rewards and arms.

A replicate is one seed: its own M_0, its own SF-CAVP, its own candidates and training noise, on the same clips. An arm
is one way to go on from M_0; every arm of a replicate starts from the same M_0 and is judged on the same test clips
with the same noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from pipelines.errors import InputError

ArmJob = Literal["rpo_rounds", "train_mmdit"]
"""Preference rounds from M_0, or plain flow matching on from it."""
BASELINE = "m0"
CODEC = "codec"
"""The subject that is no model: the real sounds after the codec, the best that any model on it can reach."""
Clips = Literal["m0", "world"]
"""M_0's own clips, where it has some, or those of the study's world."""
CONTROL_SUFFIX = "_control"
DEGRADED_FLAG = "degraded_every"
Flags = Mapping[str, Any]
"""Flags of a job as in a preset, beyond those of the study's preset."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to go on from M_0."""

    name: str
    job: ArmJob
    flags: Flags
    seeds: tuple[int, ...]
    """Replicates that have it."""
    clips: Clips
    """What it learns from; its job's flag `split` says which of them."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """The policies that come out of it: the arm itself, and its equal-steps control where it trains one."""
        return (self.name, self.name + CONTROL_SUFFIX) if self.flags.get("with_control") else (self.name,)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything a study runs."""

    preset: str
    rounds: int
    """Preference rounds of an arm that says nothing else."""
    world: Flags
    """SF-CAVP's training clips, those of the rounds, and those that are judged by."""
    m0_world: Flags
    """Clips of M_0's own training; empty: those of `world`."""
    seeds: tuple[int, ...]
    m0: Flags
    rewards: Mapping[str, Flags]
    """Kinds of SF-CAVP by name; each is trained in every replicate and measured as a ranker. One whose flags say
    `degraded_every` learns from what M_0 makes of real sounds, too."""
    degrade: Flags
    """Flags of those sounds."""
    reward: str
    """The one that ranks and that the tables report."""
    arms: tuple[Arm, ...]
    compared_with: tuple[str, ...]
    """Subjects that every other one is compared with in the tables."""
    claims: tuple[tuple[str, str], ...] = ()
    """The comparisons that the study was made for, subject and reference: a short table of their own."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """M_0, what came out of every arm, in the order of the file, and the real sounds after the codec."""
        return (BASELINE, *(subject for arm in self.arms for subject in arm.subjects), CODEC)

    @property
    def degrades(self) -> bool:
        """Whether a reward learns from degraded sounds."""
        return any(DEGRADED_FLAG in flags for flags in self.rewards.values())

    def learns_from_world(self, arm: Arm) -> bool:
        """Whether an arm is given the clips of `world`, and its rounds are gated on those of its split `val`."""
        return arm.clips == "world" or not self.m0_world

    def num_rounds(self, arm: Arm) -> int:
        """Rounds that an arm of preference rounds runs."""
        return int(arm.flags.get("rounds", self.rounds))

    def seeds_of(self, subject: str) -> tuple[int, ...]:
        """The replicates that have a subject."""
        return next((arm.seeds for arm in self.arms if subject in arm.subjects), self.seeds)


def read_study(path: Path) -> Study:
    """Read a study; raises InputError naming the file and what is wrong with it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a study's YAML file") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        study = _study(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a study: {error!r}; see jobs/studies for one") from error
    _check(study, path)
    return study


def _study(content: Mapping[str, Any]) -> Study:
    seeds = tuple(int(seed) for seed in content["seeds"])
    arms = tuple(
        Arm(
            name=str(name),
            job=arm["job"],
            flags=dict(arm.get("flags") or {}),
            seeds=tuple(int(seed) for seed in arm.get("seeds", seeds)),
            clips=arm.get("clips", "world" if arm["job"] == "rpo_rounds" else "m0"),
        )
        for name, arm in content["arms"].items()
    )
    return Study(
        preset=str(content["preset"]),
        rounds=int(content["rounds"]),
        world=dict(content["world"]),
        m0_world=dict(content.get("m0_world") or {}),
        seeds=seeds,
        m0=dict(content["m0"]),
        rewards={str(name): dict(flags or {}) for name, flags in content["rewards"].items()},
        degrade=dict(content.get("degrade") or {}),
        reward=str(content["reward"]),
        arms=arms,
        compared_with=tuple(str(name) for name in content["compared_with"]),
        claims=tuple((str(subject), str(reference)) for subject, reference in content.get("claims") or ()),
    )


def _check(study: Study, path: Path) -> None:
    wrong = [f"arm {arm.name}: job {arm.job!r}" for arm in study.arms if arm.job not in get_args(ArmJob)]
    wrong += [f"arm {arm.name}: clips {arm.clips!r}" for arm in study.arms if arm.clips not in get_args(Clips)]
    wrong += [
        f"arm {a.name}: seeds {a.seeds} beyond {study.seeds}" for a in study.arms if set(a.seeds) - {*study.seeds}
    ]
    named = {"compared_with": study.compared_with, "claims": [name for claim in study.claims for name in claim]}
    wrong += [f"{key}: no subject {n!r}" for key, names in named.items() for n in names if n not in study.subjects]
    if study.reward not in study.rewards:
        wrong.append(f"reward: {study.reward!r} is not among {list(study.rewards)}")
    if len(set(study.subjects)) < len(study.subjects) or not study.seeds:
        wrong.append("two subjects of one name, or no seed")
    if wrong:
        raise InputError(f"{path}: {'; '.join(wrong)}")
