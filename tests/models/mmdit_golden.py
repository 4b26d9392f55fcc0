"""The synthetic weights of the golden vectors: a rule from names and shapes, so that no weights need be stored."""

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.mmdit import MMDiT, MMDiTConfig

TINY_V1 = MMDiTConfig(
    latent_dim=20,
    clip_dim=48,
    sync_dim=40,
    text_dim=56,
    hidden_dim=128,
    num_heads=4,
    depth=5,
    fused_depth=3,
    latent_len=50,
    clip_len=13,
    sync_len=40,
    text_len=7,
)


def seeded(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode("ascii")))
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def fill_by_rule(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        raw, last = seeded(name, parameter.shape), name.rsplit(".", 1)[-1]
        if last == "latent_std":
            value = 1 + 0.1 * raw.abs()
        elif parameter.ndim == 1 and last == "weight":
            value = 1 + 0.1 * raw
        elif parameter.ndim <= 1:
            value = 0.1 * raw
        elif last in ("weight", "in_proj_weight"):
            value = raw / (parameter.numel() / parameter.shape[0]) ** 0.5
        else:
            value = 0.5 * raw
        parameter.copy_(value)


def golden_network() -> MMDiT:
    network = MMDiT(TINY_V1)
    fill_by_rule(network)
    return network.eval()


def golden_vectors(fixtures: Path) -> dict[str, Tensor]:
    return load_file(fixtures / "mmdit" / "tiny_v1.safetensors")


def golden_gradients(fixtures: Path) -> dict:
    return json.loads((fixtures / "mmdit" / "tiny_v1_grads.json").read_text())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute error over the RMS of what is expected."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.square().mean().sqrt()).item()
