"""Conditions of the MM-DiT: what is projected once a clip, and how hand-made features are standardised before that.

Legend: S clips (conditions); N latent tokens; Lc and Lt clip and text tokens; D hidden width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditions:
    """Projected conditions: independent of the time step, computed once a clip."""

    clip: Tensor
    """[S, Lc, D]"""
    sync: Tensor
    """[S, N, D], repeated to the latents' rate."""
    text: Tensor
    """[S, Lt, D]"""
    clip_global: Tensor
    """[S, D], projected mean of `clip`."""
    text_global: Tensor
    """[S, D], projected mean of `text`."""

    def joined(self, other: "Conditions") -> "Conditions":
        """These conditions, then as many others, in one batch; others of one clip are repeated for every clip."""
        other = other.expand(self.clip.shape[0]) if other.clip.shape[0] == 1 else other
        return Conditions(
            clip=torch.cat([self.clip, other.clip]),
            sync=torch.cat([self.sync, other.sync]),
            text=torch.cat([self.text, other.text]),
            clip_global=torch.cat([self.clip_global, other.clip_global]),
            text_global=torch.cat([self.text_global, other.text_global]),
        )

    def expand(self, batch: int) -> "Conditions":
        """The conditions of one clip (S = 1) for `batch` candidates, without copying."""
        return Conditions(
            clip=self.clip.expand(batch, -1, -1),
            sync=self.sync.expand(batch, -1, -1),
            text=self.text.expand(batch, -1, -1),
            clip_global=self.clip_global.expand(batch, -1),
            text_global=self.text_global.expand(batch, -1),
        )


class ConditionStatistics(nn.Module):
    """Per-channel mean and std of hand-made clip and sync features as buffers, fitted before training.

    Standardised sync features also pass through asinh: what happens rarely stands out by up to 60 standard deviations.
    """

    def __init__(self, clip_dim: int, sync_dim: int) -> None:
        """Start with mean 0 and std 1."""
        super().__init__()
        self.clip_mean: Tensor
        self.clip_std: Tensor
        self.sync_mean: Tensor
        self.sync_std: Tensor
        for name, dim in (("clip", clip_dim), ("sync", sync_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))

    def reset(self) -> None:
        """Mean 0 and std 1 again."""
        self.clip_mean.zero_()
        self.clip_std.fill_(1)
        self.sync_mean.zero_()
        self.sync_std.fill_(1)

    def forward(self, clip_f: Tensor, sync_f: Tensor) -> tuple[Tensor, Tensor]:
        """Standardise (B, L, channels) of both kinds, in float32 whatever the network's dtype."""
        clip = (clip_f.float() - self.clip_mean.float()) / self.clip_std.float()
        sync = (sync_f.float() - self.sync_mean.float()) / self.sync_std.float()
        return clip, torch.asinh(sync)
