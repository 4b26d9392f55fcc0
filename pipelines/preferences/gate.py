"""The gate after a round: is M_{k+1} better than M_k on held-out clips with the same noise, and at what price?

A preference round can raise the reward by ruining what the reward does not see. So the reward must rise while the
flow-matching loss on real data, the diversity among candidates and every independent measure stay within limits. The
first three limits are starting values (no publication gives them); each is an option of `rpo_rounds`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from pipelines.errors import InputError

GateMode = Literal["strict", "report"]
"""strict: a refused round ends the launch, which returns M_k; report: it is recorded and the fold goes on."""

Rule = Literal["gain", "rise", "fall", "drop"]


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """How much each measure may change from M_k to M_{k+1}."""

    min_reward_gain: float = 0.0
    """The mean reward must rise by more than this (z-units of real pairs)."""
    max_fm_loss_rise: float = 0.03
    """The flow-matching loss on real data may rise by less than this share of itself."""
    max_diversity_fall: float = 0.10
    """The diversity among the candidates of a clip may fall by less than this share of itself."""
    max_f1_fall: float = 0.02
    """Onset F1 and class-aware F1, where events are known, may fall by at most this."""
    max_mel_distance_rise: float = 0.10
    """The log-mel distance to the real sound may rise by at most this share of itself."""
    max_frechet_rise: float = 0.50
    """The Frechet distance to the real sounds after the codec may rise by at most this share of itself (it is noisy on
    few clips)."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value) or (value < 0 and name != "min_reward_gain"):
                raise InputError(f"--{name.replace('_', '-')} must be a finite number, not negative; got {value}")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One measure before and after the round, against its limit."""

    measure: str
    rule: Rule
    before: float | None
    after: float | None
    change: float | None
    """after - before, as a share of before for `rise` and `drop`; None where it was not measured."""
    limit: float
    passed: bool
    reason: str
    """What was found, in words."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of a round."""

    checks: tuple[Check, ...]

    @property
    def accepted(self) -> bool:
        """True where every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """Why it was refused; empty where it was accepted."""
        return [check.reason for check in self.checks if not check.passed]

    def to_json(self) -> dict[str, object]:
        """Plain values, for `verdict.json`."""
        return {
            "verdict": "accepted" if self.accepted else "refused",
            "reasons": self.reasons,
            "checks": [asdict(check) for check in self.checks],
        }


@dataclass(frozen=True, kw_only=True)
class _Criterion:
    measure: str
    rule: Rule
    limit: str
    """Name of the field of `GateLimits`."""
    required: bool


CRITERIA = (
    _Criterion(measure="reward", rule="gain", limit="min_reward_gain", required=True),
    _Criterion(measure="fm_loss", rule="rise", limit="max_fm_loss_rise", required=True),
    _Criterion(measure="diversity", rule="drop", limit="max_diversity_fall", required=True),
    _Criterion(measure="f1", rule="fall", limit="max_f1_fall", required=False),
    _Criterion(measure="class_f1", rule="fall", limit="max_f1_fall", required=False),
    _Criterion(measure="log_mel_distance", rule="rise", limit="max_mel_distance_rise", required=False),
    _Criterion(measure="frechet_codec", rule="rise", limit="max_frechet_rise", required=False),
)
"""What is compared and how: `gain` must be exceeded, `rise` and `drop` are relative, `fall` is absolute."""


def judge(before: Mapping[str, float], after: Mapping[str, float], limits: GateLimits) -> Verdict:
    """Compare the measures of M_k and M_{k+1} by `CRITERIA`.

    A required measure that is missing or not finite on either side refuses the round: what cannot be measured cannot
    be accepted. A measure that M_k has and M_{k+1} has not refuses it too; one that neither has (no known events) is
    left out of the checks.
    """
    values = asdict(limits)
    checks = []
    for criterion in CRITERIA:
        pair = (before.get(criterion.measure), after.get(criterion.measure))
        if criterion.required or pair != (None, None):
            checks.append(_check(criterion, *pair, limit=values[criterion.limit]))
    return Verdict(checks=tuple(checks))


def _check(criterion: _Criterion, before: float | None, after: float | None, *, limit: float) -> Check:
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        change, passed = None, False
        reason = f"{criterion.measure} was not measured on both sides ({before} before, {after} after)"
    else:
        change, passed = _apply(criterion.rule, before, after, limit)
        reason = f"{criterion.measure} {before:.4g} -> {after:.4g} ({_wording(criterion.rule, change, limit)})"
    return Check(
        measure=criterion.measure,
        rule=criterion.rule,
        before=_finite(before),
        after=_finite(after),
        change=change,
        limit=limit,
        passed=passed,
        reason=reason,
    )


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _apply(rule: Rule, before: float, after: float, limit: float) -> tuple[float, bool]:
    """The change in the rule's unit, and whether it is within the limit."""
    change = after - before
    if rule == "gain":
        return change, change > limit
    if rule == "fall":
        return change, -change <= limit
    # All relative measures are distances or losses: never negative, and 0 before leaves no share to speak of.
    share = change / before if before > 0 else math.copysign(math.inf, change) if change else 0.0
    finite = share if math.isfinite(share) else change
    return finite, (share if rule == "rise" else -share) < limit or share == 0


def _wording(rule: Rule, change: float, limit: float) -> str:
    return {
        "gain": f"{change:+.4g}, must rise by more than {limit:g}",
        "fall": f"{change:+.4g}, may fall by {limit:g}",
        "rise": f"{change:+.1%}, may rise by less than {limit:.0%}",
        "drop": f"{change:+.1%}, may fall by less than {limit:.0%}",
    }[rule]
