"""The learning rate as a pure function of the step, so that there is no scheduler state to save or to lose."""

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["constant", "cosine", "steps"]
STEP_DECAYS = (0.8, 0.9)
"""Fractions of the steps after warm-up at which `steps` multiplies by 0.1 (MMAudio: 240k and 270k of 300k)."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then constant, cosine down to `floor`, or two decays by ten."""

    peak: float
    total_steps: int
    warmup_steps: int = 0
    name: ScheduleName = "constant"
    floor: float = 0.0
    """Where `cosine` ends, as an absolute learning rate."""

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step counted from 0: (s + 1) / (warm-up + 1) of the peak at first."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        span = max(self.total_steps - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / span, 1.0)
        if self.name == "cosine":
            return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
        if self.name == "steps":
            return self.peak * 0.1 ** sum(progress >= decay for decay in STEP_DECAYS)
        return self.peak
