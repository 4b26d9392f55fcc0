"""Conditional flow matching on the straight path from noise (t = 0) to data (t = 1), and its Euler sampler.

x_t = (1 - t) x_0 + t x_1 with x_0 ~ N(0, I); the target velocity is x_1 - x_0; times are logit-normal. This is
MMAudio's recipe (arXiv 2412.15322, minimal sigma 0). All randomness comes from generators that the caller hands in, and
errors stay a vector over samples, because preference losses need them so.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, N, C], t [B]) -> velocity [B, N, C]."""

CONDITION_DROP_PROBABILITY = 0.1
"""Training replaces clip and sync together, and text independently, by the nulls with this probability a sample."""


def sample_times(num_samples: int, generator: torch.Generator) -> Tensor:
    """Logit-normal times sigmoid(N(0, 1)): float32 [num_samples] in (0, 1), on the generator's device."""
    return torch.randn(num_samples, generator=generator, device=generator.device).sigmoid()


def sample_condition_drops(num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw (drop_video, drop_text), bool [num_samples] each, for `MMDiT.replace_with_empty`."""
    uniform = torch.rand(2, num_samples, generator=generator, device=generator.device)
    drop_video, drop_text = (uniform < CONDITION_DROP_PROBABILITY).unbind(0)
    return drop_video, drop_text


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Points x_t = (1 - t) x0 + t x1 (B, N, C) between noise x0 and data x1 at times t [B]."""
    assert x0.shape == x1.shape, f"noise {tuple(x0.shape)} and data {tuple(x1.shape)}"
    t = t[:, None, None]
    return (1 - t) * x0 + t * x1


def flow_matching_loss(velocity: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """Error [B] in float32: mean over (N, C) of (velocity - (x1 - x0))^2; average it over samples for the loss."""
    return (velocity.float() - (x1 - x0).float()).square().mean(dim=(1, 2))


def euler_sample(velocity_field: VelocityField, x0: Tensor, num_steps: int) -> Tensor:
    """Integrate noise x0 (B, N, C) from t = 0 to t = 1 in `num_steps` equal Euler steps.

    The state keeps x0's dtype (float32 is wise also for a bf16 network). Raises ValueError if num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    times = torch.linspace(0.0, 1.0, num_steps + 1, dtype=torch.float32).tolist()
    x = x0
    for t, t_next in itertools.pairwise(times):
        at = torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
        x = x + (t_next - t) * velocity_field(x, at).to(x.dtype)
    return x


def euler_sample_from(velocity_field: VelocityField, x: Tensor, start: Tensor, num_steps: int) -> Tensor:
    """Integrate points x (B, N, C) of the path, each from its own time `start` [B] in [0, 1], to t = 1.

    Every sample takes `num_steps` equal Euler steps, the nearer to the end the shorter. ValueError if num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    step = (1 - start) / num_steps
    for index in range(num_steps):
        x = x + step[:, None, None] * velocity_field(x, start + index * step).to(x.dtype)
    return x
