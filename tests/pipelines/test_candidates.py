import numpy as np
import pytest
import torch

from models.policy import Policy
from models.spec import SPECS
from pipelines.preferences.candidates import (
    ConditionRow,
    Sampling,
    candidate_seeds,
    sample_candidates,
    seeded_noise,
)

TINY = SPECS["tiny"]
SAMPLING = Sampling(num_steps=2, guidance=1.0)


def condition_row(seed: int) -> ConditionRow:
    rng = np.random.default_rng(seed)
    return ConditionRow(
        clip_features=rng.standard_normal((TINY.clip_len, TINY.clip_dim)).astype(np.float16),
        sync_features=rng.standard_normal((TINY.sync_len, TINY.sync_dim)).astype(np.float16),
        text_features=rng.standard_normal((TINY.text_len, TINY.text_dim)).astype(np.float16),
    )


@pytest.fixture(scope="module")
def policy() -> Policy:
    """An untrained policy with fitted statistics, whose last layer is not zero, so that conditions matter."""
    generator = torch.Generator().manual_seed(0)
    made = Policy.create("tiny", seed=0)
    latents = torch.randn(40, TINY.latent_len, TINY.latent_dim, generator=generator)
    clip = torch.randn(40, TINY.clip_len, TINY.clip_dim, generator=generator)
    sync = torch.randn(40, TINY.sync_len, TINY.sync_dim, generator=generator)
    made.fit_statistics([(latents, clip, sync)])
    with torch.no_grad():
        for parameter in made.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    made.network.eval()
    return made


def test_more_candidates_keep_the_seeds_of_fewer() -> None:
    assert candidate_seeds(0, "clip", 1, 5)[:3] == candidate_seeds(0, "clip", 1, 3)


def test_seeds_differ_by_clip_round_index_and_launch() -> None:
    every = [
        seed
        for launch in (0, 1)
        for clip in ("a", "b")
        for index in (0, 1)
        for seed in candidate_seeds(launch, clip, index, 4)
    ]
    assert len(set(every)) == 32


def test_the_noise_of_a_candidate_does_not_depend_on_the_others() -> None:
    seeds = candidate_seeds(0, "clip", 0, 4)
    assert torch.equal(seeded_noise(seeds, (40, 32))[2], seeded_noise(seeds[2:3], (40, 32))[0])


def test_noise_is_standard_normal() -> None:
    noise = seeded_noise(candidate_seeds(0, "clip", 0, 50), (40, 32))
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_the_same_seeds_give_the_same_candidates_bit_for_bit(policy: Policy) -> None:
    seeds = candidate_seeds(0, "clip", 0, 4)
    first = sample_candidates(policy, condition_row(1), seeds, SAMPLING)
    assert first.shape == (4, TINY.latent_len, TINY.latent_dim)
    assert first.dtype == torch.float32
    assert torch.equal(first, sample_candidates(policy, condition_row(1), seeds, SAMPLING))
    assert not torch.equal(first[0], first[1])


def test_candidates_follow_the_conditions_of_their_clip(policy: Policy) -> None:
    seeds = candidate_seeds(0, "clip", 0, 2)
    ours = sample_candidates(policy, condition_row(1), seeds, SAMPLING)
    others = sample_candidates(policy, condition_row(2), seeds, SAMPLING)
    assert (ours - others).abs().max() > 1e-3


def test_the_conditions_of_a_clip_are_computed_once_for_all_its_candidates(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    preprocess = policy.network.preprocess_conditions

    def counted(clip: torch.Tensor, sync: torch.Tensor, text: torch.Tensor) -> object:
        batches.append(len(clip))
        return preprocess(clip, sync, text)

    monkeypatch.setattr(policy.network, "preprocess_conditions", counted)
    sample_candidates(policy, condition_row(1), candidate_seeds(0, "clip", 0, 4), SAMPLING)
    assert batches == [1]


def test_guidance_doubles_the_network_calls() -> None:
    assert Sampling(num_steps=25, guidance=4.5).network_calls == 50
    assert Sampling(num_steps=8, guidance=1.0).network_calls == 8
