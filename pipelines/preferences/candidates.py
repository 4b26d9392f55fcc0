"""N candidate sounds of one clip from a policy: the conditions are computed once, the candidates are the batch.

Each candidate's noise comes from its own seed, a hash of (seed, clip, round, index), drawn on the CPU and then moved:
the same on every device and whoever samples it. A sampler sees ONE clip a call, so its result does not depend on how
clips were grouped into units or shared among workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.policy import Policy
from pipelines.preferences.pairs import stable_seed


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a policy is sampled; every field affects the candidates."""

    num_steps: int
    """Euler steps."""
    guidance: float
    """Classifier-free guidance; up to 1 the conditional field alone."""

    @property
    def network_calls(self) -> int:
        """Evaluations of the network for one batch of candidates."""
        return self.num_steps * (2 if self.guidance > 1 else 1)


@dataclass(frozen=True, kw_only=True)
class ConditionRow:
    """The stored conditions of one clip: float16 [Lc, Dc], [Ls, Ds], [Lt, Dt]."""

    clip_features: np.ndarray
    sync_features: np.ndarray
    text_features: np.ndarray

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Float32 CPU tensors with a batch axis of one clip."""
        clip, sync, text = (
            torch.from_numpy(np.asarray(values, np.float32))[None]
            for values in (self.clip_features, self.sync_features, self.text_features)
        )
        return clip, sync, text


def candidate_seeds(seed: int, clip_id: str, round_index: int, num_candidates: int) -> list[int]:
    """Seeds in [0, 2^63) of a clip's candidates; the first n are the same for every number of candidates >= n."""
    return [stable_seed(seed, clip_id, round_index, index) for index in range(num_candidates)]


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """N(0, 1) noise [len(seeds), *shape], float32 on the CPU, each row from its own generator."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sample_candidates(policy: Policy, conditions: ConditionRow, seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """Stored latents [len(seeds), N, C] on the CPU, float32, one for each seed; may hold non-finite values."""
    noise = seeded_noise(seeds, policy.noise_shape(1)[1:])
    return policy.generate(*conditions.tensors(), noise, sampling.num_steps, sampling.guidance).cpu()
