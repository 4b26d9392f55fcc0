"""Preference optimisation for flow matching (DPO-FM): a winner and a loser, a policy and its frozen reference.

Everything is computed from four errors a sample, each the MEAN over (N, C) of the squared velocity error at the same
noise, time, conditions and condition drops; the unit of kappa depends on that mean. With D = policy error - reference
error of winner (w) and loser (l), the loss is -log sigma(-kappa (D_w - D_l)) + fm_weight * policy error of the winner:
Diffusion-DPO (arXiv 2311.12908) carried to flows, with the anchor of CRPO (TangoFlux, arXiv 2412.21037), whose
beta = 2 kappa. Safeguards against loser-driven collapse: `loser_clip`, `loser_gradient_scale` (Diffusion-SDPO, arXiv
2511.03317) and `CollapseMonitor`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_TIME_QUARTILES = 4
QUARTILE_METRICS = ("implicit_accuracy", "implicit_margin", "winner_displacement", "loser_displacement")
"""The metrics that are also reported by quarter of the time axis."""


@dataclass(frozen=True, kw_only=True)
class PreferenceLossConfig:
    """Weights and safeguards of the DPO-FM loss."""

    kappa: float
    """beta / 2, on mean-reduced errors; one knob together with the learning rate. 0 leaves flow matching alone."""
    fm_weight: float = 1.0
    """Weight of the winner's flow-matching error."""
    divide_by_kappa: bool = False
    """Use L_DPO / kappa, so that kappa shapes the loss and does not scale its gradient."""
    label_smoothing: float = 0.0
    """Probability that a pair's label is wrong, in [0, 0.5)."""
    loser_clip: float | None = None
    """No gradient pushes the loser's displacement beyond this (0.05 is a start)."""

    def __post_init__(self) -> None:
        if self.kappa < 0 or (self.divide_by_kappa and self.kappa == 0):
            raise ValueError(f"kappa must be positive (or 0 without divide_by_kappa), got {self.kappa}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")
        if self.loser_clip is not None and self.loser_clip <= 0:
            raise ValueError(f"loser_clip must be positive, got {self.loser_clip}")


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """Flow-matching errors [B] of both sounds of a pair, under the policy (with gradient) and the reference."""

    policy_winner: Tensor
    policy_loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor


def dpo_flow_matching_loss(
    errors: PairErrors,
    config: PreferenceLossConfig,
    *,
    times: Tensor | None = None,
    loser_scale: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (scalar) and detached scalar metrics of one batch of pairs.

    `times` [B] adds the metrics by time quartile (sums and counts: see `quartile_means`). `loser_scale` [B] in [0, 1],
    from `loser_gradient_scale`, weakens the loser's gradient and leaves every value as it is. The reference never gets
    a gradient.
    """
    reference_winner, reference_loser = errors.reference_winner.detach(), errors.reference_loser.detach()
    policy_loser = errors.policy_loser
    if loser_scale is not None:
        scale = loser_scale.detach()
        policy_loser = scale * policy_loser + (1 - scale) * policy_loser.detach()
    winner_displacement = errors.policy_winner - reference_winner
    loser_displacement = policy_loser - reference_loser
    if config.loser_clip is not None:
        loser_displacement = loser_displacement.clamp(max=config.loser_clip)

    margin = config.kappa * (loser_displacement - winner_displacement)
    dpo = -((1 - config.label_smoothing) * F.logsigmoid(margin) + config.label_smoothing * F.logsigmoid(-margin)).mean()
    if config.divide_by_kappa:
        dpo = dpo / config.kappa
    fm_winner = errors.policy_winner.mean()
    loss = dpo + config.fm_weight * fm_winner
    metrics = {"loss": loss.detach(), "loss_dpo": dpo.detach(), "loss_fm_winner": fm_winner.detach()}
    return loss, metrics | preference_metrics(errors, config.kappa, times)


@torch.no_grad()
def preference_metrics(errors: PairErrors, kappa: float, times: Tensor | None) -> dict[str, Tensor]:
    """Means over the batch of what the four errors tell, before any safeguard touches them.

    Implicit accuracy is the share of pairs with D_w < D_l, a tie counts one half; implicit margin is
    kappa (D_l - D_w); saturation is sigma(-margin), 0.5 at the start and near 0 when a pair pulls no more.
    """
    winner_displacement = errors.policy_winner - errors.reference_winner
    loser_displacement = errors.policy_loser - errors.reference_loser
    difference = loser_displacement - winner_displacement
    margin = kappa * difference
    per_sample = {
        "implicit_accuracy": 0.5 * (1 + difference.sign()),
        "implicit_margin": margin,
        "winner_displacement": winner_displacement,
        "loser_displacement": loser_displacement,
        "saturation": torch.sigmoid(-margin),
        "error_policy_winner": errors.policy_winner,
        "error_policy_loser": errors.policy_loser,
        "error_reference_winner": errors.reference_winner,
        "error_reference_loser": errors.reference_loser,
    }
    metrics = {name: values.mean() for name, values in per_sample.items()}
    if times is None:
        return metrics
    quartile = (times * NUM_TIME_QUARTILES).long().clamp(0, NUM_TIME_QUARTILES - 1)
    member = F.one_hot(quartile, NUM_TIME_QUARTILES).to(margin.dtype)
    for q in range(NUM_TIME_QUARTILES):
        metrics[f"count_t{q}"] = member[:, q].sum()
        for name in QUARTILE_METRICS:
            metrics[f"{name}_sum_t{q}"] = (per_sample[name] * member[:, q]).sum()
    return metrics


def quartile_means(metrics: dict[str, float]) -> dict[str, float]:
    """Turn `*_sum_t<q>` and `count_t<q>` into means `*_t<q>`; quartiles without a sample are left out.

    Sums and counts may be added or averaged over steps and ranks before, since both change by the same factor; the
    other metrics pass unchanged. Quartile q holds the times in [q/4, (q+1)/4).
    """
    means: dict[str, float] = {}
    for name, value in metrics.items():
        if name.startswith("count_t"):
            continue
        base, marker, quartile = name.rpartition("_sum_t")
        if not marker:
            means[name] = value
        elif metrics[f"count_t{quartile}"] > 0:
            means[f"{base}_t{quartile}"] = value / metrics[f"count_t{quartile}"]
    return means


@torch.no_grad()
def loser_gradient_scale(residual_winner: Tensor, residual_loser: Tensor, mu: float) -> Tensor:
    """Diffusion-SDPO's factor [B] on the loser's gradient, which keeps the winner's error from rising (first order).

    The residuals are velocity - target, (B, N, C); the output-space gradient of a mean-reduced error is the residual
    up to one common factor, which cancels. lambda = clamp((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1) where <g_w, g_l> > 0,
    else 1. `mu` in [0, 1]: 0.5 to 0.9 are sensible, 1 removes the loser where it would hurt.
    """
    if not 0 <= mu <= 1:
        raise ValueError(f"mu must lie in [0, 1], got {mu}")
    winner, loser = residual_winner.float().flatten(1), residual_loser.float().flatten(1)
    inner = (winner * loser).sum(dim=1)
    tiny = torch.finfo(inner.dtype).tiny
    scale = ((1 - mu) * winner.square().sum(dim=1) / inner.clamp(min=tiny)).clamp(0, 1)
    return torch.where(inner > 0, scale, torch.ones_like(scale))


@dataclass
class CollapseMonitor:
    """Alarm of loser-driven collapse from running averages of the metrics; it decides nothing itself.

    Two ratios are averaged exponentially over about `horizon_steps` steps: the winner's displacement over its
    reference error (alarm above `max_winner_rise`) and the loser's error over its reference error (alarm above
    `max_loser_ratio`). No alarm before `horizon_steps` steps. A rising winner error alone is no proof of failure
    (TangoFlux saw it while its scores improved), so callers may only warn.
    """

    max_winner_rise: float = 0.02
    max_loser_ratio: float = 1.2
    horizon_steps: int = 50
    steps: int = 0
    winner_rise: float = 0.0
    loser_ratio: float = 1.0

    def update(self, metrics: dict[str, float]) -> str | None:
        """Take one step's metrics (means over all ranks); return a one-line reason if an alarm holds, else None."""
        rise = metrics["winner_displacement"] / metrics["error_reference_winner"]
        ratio = metrics["error_policy_loser"] / metrics["error_reference_loser"]
        if math.isfinite(rise) and math.isfinite(ratio):
            weight = 1 / min(self.steps + 1, self.horizon_steps)
            self.steps += 1
            self.winner_rise += weight * (rise - self.winner_rise)
            self.loser_ratio += weight * (ratio - self.loser_ratio)
        if self.steps < self.horizon_steps:
            return None
        if self.winner_rise > self.max_winner_rise:
            return f"winner error {self.winner_rise:+.1%} above its reference (limit {self.max_winner_rise:+.1%})"
        if self.loser_ratio > self.max_loser_ratio:
            return f"loser error {self.loser_ratio:.2f} times its reference (limit {self.max_loser_ratio:.2f})"
        return None

    def state_dict(self) -> dict[str, float]:
        """The running state, for a checkpoint."""
        return {"steps": self.steps, "winner_rise": self.winner_rise, "loser_ratio": self.loser_ratio}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()`."""
        self.steps = int(state["steps"])
        self.winner_rise = state["winner_rise"]
        self.loser_ratio = state["loser_ratio"]
