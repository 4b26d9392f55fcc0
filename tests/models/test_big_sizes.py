"""The big public sizes at work: one bf16 velocity each, on weights made by a rule (names and shapes: test_mmdit)."""

import gc

import pytest
import torch
from torch import Tensor

from models.mmdit import SIZES, MMDiT
from tests.models.mmdit_golden import fill_by_rule, seeded

pytestmark = pytest.mark.slow

LENGTHS = {"latent_len": 40, "clip_len": 8, "sync_len": 24}
"""About a second of sound: a forward costs the reading of the weights, and that is what is tested."""


def _network(size: str, dtype: torch.dtype) -> MMDiT:
    """Never a second copy of the weights: built on the meta device, cast there, and filled where it will stay."""
    with torch.device("meta"):
        network = MMDiT(SIZES[size])
    network.to(dtype).to_empty(device="cpu")
    fill_by_rule(network)
    network.set_lengths(**LENGTHS)
    return network.eval()


def _inputs(size: str) -> list[Tensor]:
    config = SIZES[size]
    return [
        seeded("latent", (1, LENGTHS["latent_len"], config.latent_dim)),
        seeded("clip", (1, LENGTHS["clip_len"], config.clip_dim)),
        seeded("sync", (1, LENGTHS["sync_len"], config.sync_dim)),
        seeded("text", (1, config.text_len, config.text_dim)),
        torch.tensor([0.8]),
    ]


@torch.no_grad()
@pytest.mark.parametrize("size", ["medium_44k", "large_44k", "large_44k_v2"])
def test_a_big_size_gives_a_finite_bf16_velocity_that_hears_every_input(size: str) -> None:
    inputs = _inputs(size)
    # Sample 0 is the plain one, and in each of the others one input is halved.
    batch = [tensor.repeat(1 + len(inputs), *[1] * (tensor.ndim - 1)) for tensor in inputs]
    for place, tensor in enumerate(batch):
        tensor[1 + place] *= 0.5
    flow = _network(size, torch.bfloat16)(*batch)
    gc.collect()
    assert flow.dtype == torch.bfloat16
    assert flow.shape == (1 + len(inputs), LENGTHS["latent_len"], SIZES[size].latent_dim)
    assert torch.isfinite(flow).all()
    flow = flow.float()
    change = (flow[1:] - flow[0]).square().mean(dim=(1, 2)).sqrt() / flow[0].std()
    for name, moved in zip(("latent", "clip", "sync", "text", "time"), change.tolist(), strict=True):
        assert moved > 0.05, name


@torch.no_grad()
def test_the_medium_size_under_bf16_autocast_is_the_float32_one_up_to_rounding() -> None:
    network, inputs = _network("medium_44k", torch.float32), _inputs("medium_44k")
    flow = network(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = network(*inputs).float()
    halved = network.to(torch.bfloat16)(*inputs).float()
    gc.collect()
    for rounded in (autocast, halved):
        error = ((rounded - flow).square().mean().sqrt() / flow.std()).item()
        assert 1e-4 < error < 0.05
