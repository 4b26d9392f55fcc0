"""The true small_16k network on synthetic weights: the velocity of the original, in float32 and in bfloat16."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.mmdit import SIZES, MMDiT
from tests.models.mmdit_golden import fill_by_rule, relative_error, seeded

BF16_TOLERANCE = 0.05
"""RMS of the error over the RMS of what is expected."""


@pytest.fixture(scope="module")
def network() -> Iterator[MMDiT]:
    torch.set_num_threads(1)
    with torch.device("meta"):
        made = MMDiT(SIZES["small_16k"])
    made.to_empty(device="cpu")
    fill_by_rule(made)
    yield made.eval().requires_grad_(False)
    del made


def inputs() -> tuple[Tensor, ...]:
    shapes = {"latent": (1, 250, 20), "clip_f": (1, 64, 1024), "sync_f": (1, 192, 768), "text_f": (1, 77, 1024)}
    return *(seeded(f"mmdit_small_16k.{name}", shape) for name, shape in shapes.items()), torch.tensor([0.137])


def test_the_velocity_is_the_originals_and_bfloat16_stays_near_it(network: MMDiT, fixtures: Path) -> None:
    expected = load_file(fixtures / "mmdit" / "small_16k_flow.safetensors")["out.flow"]
    assert relative_error(network(*inputs()), expected) < 1e-4
    rounded = network.to(torch.bfloat16)(*inputs()).float()
    assert float((rounded - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < BF16_TOLERANCE
