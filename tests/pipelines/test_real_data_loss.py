import numpy as np
import pytest
import torch

from models.policy import Policy
from models.spec import SPECS
from pipelines.evaluation.real_data_loss import real_data_loss
from pipelines.preferences.candidates import ConditionRow
from tests.pipelines.test_candidates import condition_row, policy

TINY = SPECS["tiny"]
__all__ = ["policy"]


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(TINY.latent_len, TINY.latent_dim, generator=torch.Generator().manual_seed(3))


def loss(policy: Policy, latents: torch.Tensor, row: ConditionRow, seed: int = 0, clip_id: str = "clip") -> float:
    return real_data_loss(policy, row, latents, seed=seed, clip_id=clip_id)


def test_two_policies_are_asked_the_same_question(policy: Policy, latents: torch.Tensor) -> None:
    assert loss(policy, latents, condition_row(1)) == loss(policy, latents, condition_row(1))
    assert loss(policy, latents, condition_row(1)) != loss(policy, latents, condition_row(1), seed=1)
    assert loss(policy, latents, condition_row(1)) != loss(policy, latents, condition_row(1), clip_id="other")


def test_it_depends_on_the_conditions_of_the_clip(policy: Policy, latents: torch.Tensor) -> None:
    assert loss(policy, latents, condition_row(1)) != loss(policy, latents, condition_row(2))


def test_a_policy_that_knows_the_answer_has_no_loss_and_one_that_says_nothing_has_two(
    policy: Policy, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = policy.transform.normalize(latents[None])

    def exact(x: torch.Tensor, t: torch.Tensor, conditions: object) -> torch.Tensor:
        # x = (1 - t) noise + t data, so data - noise = (data - x) / (1 - t).
        return (data - x) / (1 - t[:, None, None])

    monkeypatch.setattr(policy.network, "predict", exact)
    assert loss(policy, latents, condition_row(1)) < 1e-6
    monkeypatch.setattr(policy.network, "predict", lambda x, t, conditions: torch.zeros_like(x))
    # Whitened data and noise are independent and of variance 1 each.
    expected = 1 + float(data.square().mean())
    assert loss(policy, latents, condition_row(1)) == pytest.approx(expected, rel=0.05)
    assert np.isfinite(expected)
