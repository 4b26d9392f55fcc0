"""The big networks in bfloat16 on a short latent: they fit, they run, and medium_44k is what its float32 self is."""

import gc

import pytest
import torch
from torch import Tensor

from models.mmdit import SIZES, MMDiT
from tests.models.mmdit_golden import seeded

LENGTHS = (16, 4, 8)
"""Latent, clip and sync tokens: a third of a second."""


def network(size: str, dtype: torch.dtype) -> MMDiT:
    """Weights of unit gain from one seed, made in their dtype: a 1-B network in float32 would be 4 GB more."""
    with torch.device("meta"):
        made = MMDiT(SIZES[size]).to(dtype)
    made.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        is_gain = name.endswith("norm.weight")
        scale = 0.05 if parameter.ndim < 2 else (parameter.shape[0] / parameter.numel()) ** 0.5
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).mul_(0.1 if is_gain else scale)
        parameter.data.copy_(values + 1 if is_gain else values)
    made.set_lengths(*LENGTHS)
    return made.eval().requires_grad_(False)


def inputs(made: MMDiT) -> tuple[Tensor, ...]:
    config, (latent, clip, sync) = made.config, LENGTHS
    return (
        seeded("big.latent", (1, latent, config.latent_dim)),
        seeded("big.clip", (1, clip, config.clip_dim)),
        seeded("big.sync", (1, sync, config.sync_dim)),
        seeded("big.text", (1, 77, config.text_dim)),
        torch.tensor([0.4]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", ["large_44k", "large_44k_v2"])
def test_a_billion_parameters_give_a_finite_velocity_in_bfloat16(size: str) -> None:
    made = network(size, torch.bfloat16)
    assert sum(parameter.numel() for parameter in made.parameters()) > 1.03e9
    flow = made(*inputs(made))
    assert flow.dtype == torch.bfloat16
    assert flow.shape == (1, 16, 40)
    assert torch.isfinite(flow).all()
    assert float(flow.float().std()) > 0.01
    del made
    gc.collect()


@pytest.mark.slow
def test_medium_44k_in_bfloat16_is_near_its_float32_self() -> None:
    exact = network("medium_44k", torch.float32)
    expected = exact(*inputs(exact))
    rounded = exact.to(torch.bfloat16)(*inputs(exact)).float()
    error = (rounded - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) < 0.05
