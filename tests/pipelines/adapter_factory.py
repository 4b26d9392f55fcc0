"""A start for tests of fine-tuning: a tiny policy whose weights are nowhere zero, as after a training."""

from pathlib import Path

import torch

from models.policy import Policy
from pipelines.training.flow_matching_objective import fit_starting_policy


def trained_start(root: Path, features: Path) -> None:
    """Leave in `root/start` a policy fitted on `features` with noise on every weight.

    A fresh network is zero everywhere; without the noise no gradient would reach most of it.
    """
    start = root / "start"
    fit_starting_policy("tiny", 0, str(features), "train", start)
    policy = Policy.load(start)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy.save(start)
