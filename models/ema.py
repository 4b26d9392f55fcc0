"""Exponential moving averages of weights: the plain one, and EDM2's power-function one with post-hoc synthesis.

The power-function average (Karras et al. 2024, arXiv 2312.02696) weighs step t by t^gamma, so its width is a fixed
share of the training so far; averages of two widths, stored now and then, can afterwards be combined into any width.
Shadows are float32 and ordered as the parameters were given.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def gamma_of_width(sigma_rel: float) -> float:
    """The exponent gamma whose average has relative width `sigma_rel` (0.05 -> 16.97, 0.10 -> 6.94).

    Largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2) = 0; sigma_rel in (0, 0.28).
    """
    if not 0 < sigma_rel < 0.28:
        raise ValueError(f"sigma_rel must lie in (0, 0.28), got {sigma_rel}")
    inverse = sigma_rel**-2
    companion = torch.tensor(
        [[-7.0, inverse - 16, inverse - 12], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64
    )
    roots = torch.linalg.eigvals(companion)
    return max(root.real for root in roots.tolist() if abs(root.imag) < 1e-6)


def power_decay(step: int, gamma: float, update_every: int = 1) -> float:
    """Decay of the update after `step` (>= 1) updates: the mean of the exact decays at its two ends, to the power u.

    [(1 - 1/(s+1))^(1+gamma) (1 - 1/(s+1+u))^(1+gamma)]^(u/2).
    """
    start, end = 1 - 1 / (step + 1), 1 - 1 / (step + 1 + update_every)
    return (start * end) ** ((1 + gamma) * update_every / 2)


def exponential_decay(step: int, decay: float) -> float:
    """Decay of update number `step` (>= 1) of a plain average: ramps up as (1 + s) / (10 + s) to `decay`."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """Float32 shadows of parameters, updated with a decay that the caller chooses a step.

    `average.update(parameters, power_decay(average.num_updates + 1, gamma))`, or `exponential_decay(...)`. The first
    value is a copy of the parameters.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        """Copy the parameters; their order must stay the same in every call."""
        self.shadows = [parameter.detach().float().clone() for parameter in parameters]
        self.num_updates = 0

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], decay: float) -> None:
        """Shadow <- decay * shadow + (1 - decay) * parameter."""
        for shadow, parameter in zip(self.shadows, parameters, strict=True):
            shadow.lerp_(parameter.detach().to(shadow), 1 - decay)
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        """Write the averages into parameters (cast to their dtype and device)."""
        for shadow, parameter in zip(self.shadows, parameters, strict=True):
            parameter.copy_(shadow)

    def state_dict(self) -> dict[str, object]:
        """Everything needed to go on, for a checkpoint."""
        return {"num_updates": self.num_updates, "shadows": self.shadows}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from `state_dict()`; ValueError if the shadows do not fit."""
        shadows, num_updates = state["shadows"], state["num_updates"]
        if not isinstance(shadows, list) or not isinstance(num_updates, int):
            raise ValueError("the state of a weight average holds a list `shadows` and an integer `num_updates`")
        if [shadow.shape for shadow in shadows] != [shadow.shape for shadow in self.shadows]:
            raise ValueError(f"{len(shadows)} stored averages do not fit {len(self.shadows)} parameters")
        self.shadows = [stored.to(own) for stored, own in zip(shadows, self.shadows, strict=True)]
        self.num_updates = num_updates


def synthesis_weights(steps: Sequence[int], gammas: Sequence[float], target_step: int, target_gamma: float) -> Tensor:
    """Weights [n] (float64) that combine stored averages into the one with `target_gamma` at `target_step`.

    Average i was stored after `steps[i]` steps with exponent `gammas[i]`. Least-squares projection of the wished
    profile on the stored ones: A w = b with the inner products of power profiles (EDM2, appendix C).
    """
    stored = torch.tensor([steps, gammas], dtype=torch.float64)
    target = torch.tensor([[target_step], [target_gamma]], dtype=torch.float64)
    gram = _profile_products(stored, stored)
    return torch.linalg.solve(gram, _profile_products(stored, target).squeeze(1))


def _profile_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [n, m] of the power profiles a [2, n] and b [2, m] (rows: step, gamma).

    (ga + 1)(gb + 1)(ta / tb)^e / ((ga + gb + 1) max(ta, tb)), e = gb if ta < tb else -ga.
    """
    (step_a, gamma_a), (step_b, gamma_b) = a[:, :, None], b[:, None, :]
    exponent = torch.where(step_a < step_b, gamma_b, -gamma_a)
    ratio = (step_a / step_b) ** exponent
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * torch.maximum(step_a, step_b))


def synthesise(averages: Sequence[dict[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    """Weighted sum of stored state dicts (same names), accumulated in float64 and returned in their own dtypes."""
    if len(averages) != len(weights):
        raise ValueError(f"{len(averages)} averages, but {len(weights)} weights")
    return {
        name: sum(
            (weight * average[name].double() for weight, average in zip(weights, averages, strict=True)),
            start=torch.zeros_like(first, dtype=torch.float64),
        ).to(first.dtype)
        for name, first in averages[0].items()
    }
