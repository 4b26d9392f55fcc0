"""Rotary position embedding of the MM-DiT: interleaved pairs, float32, positions expressed in latent tokens.

Angles are recomputed for every forward (a few thousand sines) instead of being kept as buffers: there is
nothing to cast to bf16 by accident, to lose on the meta device or to keep in step when sequence lengths change.
"""

import torch
from einops import rearrange
from torch import Tensor

BASE = 10_000


def rotary_angles(num_tokens: int, head_dim: int, scale: float, device: torch.device) -> Tensor:
    """Angles [num_tokens, head_dim / 2] in rad, float32: p * scale * 10000^(-2i / head_dim).

    `scale` stretches positions: 1 for latents, latent_len / clip_len for the clip stream.
    """
    assert head_dim % 2 == 0, f"head_dim must be even, got {head_dim}"
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = (1.0 / (BASE**exponents)) * scale
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    return positions[:, None] * frequencies[None, :]


def rotary_table(num_tokens: int, head_dim: int, scale: float, device: torch.device) -> Tensor:
    """Cosines and sines of `rotary_angles`, stacked: [2, num_tokens, head_dim / 2] float32."""
    angles = rotary_angles(num_tokens, head_dim, scale, device)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved channel pairs of x (..., L, head_dim) by a `rotary_table` [2, L, head_dim / 2].

    Evaluated and returned in float32: (y_2i, y_2i+1) = (c x_2i - s x_2i+1, s x_2i + c x_2i+1).
    """
    assert x.shape[-2] == table.shape[1], f"{x.shape[-2]} tokens, but a table for {table.shape[1]}"
    even, odd = rearrange(x.float(), "... (d two) -> two ... d", two=2).unbind(0)
    cos, sin = table.unbind(0)
    rotated = [torch.addcmul(cos * even, sin, odd, value=-1), torch.addcmul(sin * even, cos, odd)]
    return torch.stack(rotated, dim=-1).flatten(-2)
