"""Clips for SF-CAVP's tests: what flashes also clicks; and the draws of their samples."""

import torch
from torch import Tensor

from models.sf_cavp_views import LossConfig, draw_uniforms


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def hard_draws(count: int, config: LossConfig, first: int = 0) -> Tensor:
    return draw_uniforms(generators(count, first), [config.hard_from] * count, config)


def flashes_and_clicks(num_clips: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clips of 2.5 s in which the screen flashes and a click sounds at the same three times."""
    generator = torch.Generator().manual_seed(seed)
    frames, waves = torch.full((num_clips, 40, 3, 32, 32), 0.2), torch.randn(num_clips, 40_000, generator=generator)
    waves *= 0.002
    for i in range(num_clips):
        for step in torch.randperm(38, generator=generator)[:3].tolist():
            frames[i, step] = 0.9
            waves[i, step * 1000 : step * 1000 + 1500] += 0.4 * torch.sin(torch.arange(1500) * 0.4)
    return frames, waves
