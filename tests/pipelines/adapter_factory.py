"""A start for tests of fine-tuning: a tiny policy whose weights are nowhere zero, as after a training."""

from pathlib import Path

import torch

from models.policy import Policy
from tests.world_factory import write_policy


def trained_start(root: Path, features: Path) -> None:
    """Leave the untrained artifact in `root/policy` and the policy with noise on every weight in `root/start`.

    A fresh network is zero everywhere; without the noise no gradient would reach most of it.
    """
    policy = Policy.load(write_policy(root / "policy", features))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    (root / "start").mkdir()
    policy.save(root / "start")
