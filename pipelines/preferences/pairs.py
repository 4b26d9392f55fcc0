"""Which scored sounds of a clip become winner and loser, or why none do: a pure function of the scores.

Every clip ends in exactly one of three ways: a kept pair, a dropped pair with one of `DROP_REASONS`, or a
reject (the clip itself could not be processed). `count_outcomes` asserts that nothing is lost between them.
"""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pipelines.errors import ContractError, InputError

PairMode = Literal["gt_vs_worst", "best_vs_worst", "gt_vs_random", "random_vs_random", "gt_vs_distorted", "mixed"]
"""gt_vs_worst: the ground truth against the lowest candidate (the paper's); best_vs_worst: highest against
lowest candidate (CRPO); gt_vs_random and random_vs_random: the same with valid candidates drawn at random
(controls without ranking); gt_vs_distorted: the ground truth against itself made wrong in time; mixed: one
of the others, drawn for each pair."""
TWO_CANDIDATES = ("best_vs_worst", "random_vs_random")
"""Modes whose winner is a candidate, too."""

DROP_REASONS = (
    "invalid_ground_truth",
    "invalid_candidate",
    "identical",
    "tie",
    "gt_below_loser",
    "margin",
)
"""In the order in which they are tested; a dropped pair carries the first that holds."""

GROUND_TRUTH = "ground_truth"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One scored sound that may win or lose."""

    origin: str
    """`ground_truth`, `candidate_<i>` or `distorted_<how>`."""
    reward: float
    """R in units of the reward's calibration; NaN where it could not be scored."""
    valid: bool
    """False where a guard of the reward (silence, clipping, non-finite) refused it."""
    content: str
    """Digest of its latents: equal content is the same sound."""

    @property
    def usable(self) -> bool:
        """Valid and with a finite reward."""
        return self.valid and math.isfinite(self.reward)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The outcome for one clip. Winner and loser are None only where no pair could be formed at all."""

    winner: Contender | None
    loser: Contender | None
    drop_reason: str | None

    @property
    def kept(self) -> bool:
        """True where the pair goes into training."""
        return self.drop_reason is None

    @property
    def margin(self) -> float | None:
        """R(winner) - R(loser), None where there is no pair."""
        if self.winner is None or self.loser is None:
            return None
        return self.winner.reward - self.loser.reward


def choose(
    mode: PairMode,
    ground_truth: Contender,
    candidates: Sequence[Contender],
    min_margin: float,
    rng: random.Random,
) -> Choice:
    """Choose winner and loser of one clip.

    In the three `gt_*` modes the winner is always the ground truth; for `gt_vs_distorted` the candidates
    are the distorted ground truths. Unusable candidates take no part. Ties between candidates go to the
    lower index, so the choice is a function of its arguments; `rng` is drawn from only by the random modes. A
    pair of equal rewards says nothing and is dropped at every margin, also at 0; of two candidates drawn at
    random the rewards are not asked. `mixed` is resolved by `pick_mode` beforehand: ValueError here.
    """
    if mode == "mixed":
        raise ValueError("mixed is not a way to choose; draw a mode with pick_mode first")
    usable = [candidate for candidate in candidates if candidate.usable]
    needed = 2 if mode in TWO_CANDIDATES else 1
    if mode not in TWO_CANDIDATES and not ground_truth.usable:
        return Choice(winner=None, loser=None, drop_reason="invalid_ground_truth")
    if len(usable) < needed:
        return Choice(winner=None, loser=None, drop_reason="invalid_candidate")
    if mode == "random_vs_random":
        winner, loser = rng.sample(usable, 2)
        same = winner.content == loser.content
        return Choice(winner=winner, loser=loser, drop_reason="identical" if same else None)
    worst = min(usable, key=lambda candidate: candidate.reward)
    if mode == "best_vs_worst":
        best = max(usable, key=lambda candidate: candidate.reward)
        return _filtered(best, worst, min_margin)
    loser = rng.choice(usable) if mode == "gt_vs_random" else worst
    return _filtered(ground_truth, loser, min_margin)


def _filtered(winner: Contender, loser: Contender, min_margin: float) -> Choice:
    margin = winner.reward - loser.reward
    reason = None
    if winner.origin != loser.origin and winner.content == loser.content:
        reason = "identical"
    elif margin == 0:
        reason = "tie"
    elif margin < 0:
        reason = "gt_below_loser"
    elif margin < min_margin:
        reason = "margin"
    return Choice(winner=winner, loser=loser, drop_reason=reason)


def stable_seed(*parts: str | int) -> int:
    """A seed in [0, 2^63) from strings and integers, the same on every machine and Python run (sha256)."""
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def parse_mixture(entries: Sequence[str]) -> dict[PairMode, float]:
    """Read `mode=probability` entries into probabilities that sum to 1.

    Raises InputError, naming the entry, for an unknown mode, a repeated one, a probability outside [0, 1],
    or a sum that is not 1.
    """
    known: dict[str, PairMode] = {mode: mode for mode in get_args(PairMode) if mode != "mixed"}
    mixture: dict[PairMode, float] = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        if name not in known or name in mixture:
            raise InputError(f"--mixture: {entry!r}: give each of {', '.join(known)} at most once, as MODE=PROBABILITY")
        try:
            probability = float(text)
        except ValueError:
            probability = math.nan
        if not 0 <= probability <= 1:
            raise InputError(f"--mixture: {entry!r}: the probability must be a number from 0 to 1")
        mixture[known[name]] = probability
    if not math.isclose(sum(mixture.values()), 1.0, abs_tol=1e-6):
        raise InputError(f"--mixture: the probabilities sum to {sum(mixture.values()):g}; they must sum to 1")
    return mixture


def pick_mode(mixture: Mapping[PairMode, float], rng: random.Random) -> PairMode:
    """Draw one mode with its probability (which sum to 1)."""
    modes = list(mixture)
    return rng.choices(modes, weights=[mixture[mode] for mode in modes])[0]


def count_outcomes(num_clips: int, drop_reasons: Sequence[str | None], num_rejects: int) -> dict[str, int]:
    """Counts for the manifest: clips, kept, dropped_<reason> for every reason that occurred, rejects.

    `drop_reasons` has one entry a pair row, None where it was kept. Raises ContractError where the counts
    do not add up (clips = kept + dropped + rejects) or a reason is unknown: a clip was lost.
    """
    reasons = Counter(drop_reasons)
    kept = reasons.pop(None, 0)
    dropped = {f"dropped_{reason}": reasons[reason] for reason in DROP_REASONS if reasons[reason]}
    if kept + sum(dropped.values()) + num_rejects != num_clips:
        raise ContractError(
            f"pairs: {num_clips} clips went in but {kept} kept + {sum(dropped.values())} dropped "
            f"({dict(reasons)}) + {num_rejects} rejects came out; a defect: keep the folder and report it"
        )
    return {"clips": num_clips, "kept": kept, **dropped, "rejects": num_rejects}
