"""From the codec's stored latents to what the network sees, and back; fitted once, before the first training step.

Named sizes standardise each channel by `network.latent_mean` and `latent_std`, which live in the network's own weights.
The tiny size stores log-mel patches of 160 channels, most of them redundant: it projects them to 32 principal
components, all of much the same size. Statistics are float64 sums over one clip at a time, in the order the clips come,
so that neither batching nor the number of workers changes a bit of them.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from models.mmdit import ConditionStatistics, MMDiT

RELATIVE_STD_FLOOR = 0.5
"""A condition channel's std is at least this share of the mean std: where nothing ever moves, noise is not blown up."""

WHITENING_RIDGE = 0.005
"""Share of the total variance that is added to each component's own before whitening: components of mere noise, with
less than that, stay small, so that the loss is spent on what can be predicted (measured on the demo world)."""


class LatentTransform(Protocol):
    """Stored latents [B, N, C_stored] <-> network latents [B, N, C_model], both float32."""

    def normalize(self, latents: Tensor) -> Tensor:
        """Stored -> network."""
        ...

    def unnormalize(self, latents: Tensor) -> Tensor:
        """Network -> stored."""
        ...


class ChannelTransform:
    """The named sizes' transform: (x - mean) / std a channel, read from the network at every call."""

    def __init__(self, network: MMDiT) -> None:
        """The network whose `latent_mean` and `latent_std` count."""
        self.network = network

    def normalize(self, latents: Tensor) -> Tensor:
        """Stored -> network."""
        return (latents.float() - self.network.latent_mean.float()) / self.network.latent_std.float()

    def unnormalize(self, latents: Tensor) -> Tensor:
        """Network -> stored."""
        return latents.float() * self.network.latent_std.float() + self.network.latent_mean.float()


class Whitening(nn.Module):
    """The tiny size's transform: rotate to principal components and bring each to a variance near 1.

    Component i, of variance l_i, is divided by sqrt(l_i + ridge), and all by one number that makes the mean variance 1.
    """

    def __init__(self, stored_dim: int, model_dim: int) -> None:
        """Not a number until it is fitted or loaded."""
        super().__init__()
        self.mean: Tensor
        self.projection: Tensor
        self.inverse: Tensor
        self.register_buffer("mean", torch.full((stored_dim,), float("nan")))
        self.register_buffer("projection", torch.full((stored_dim, model_dim), float("nan")))
        self.register_buffer("inverse", torch.full((model_dim, stored_dim), float("nan")))

    def normalize(self, latents: Tensor) -> Tensor:
        """[..., stored_dim] -> [..., model_dim]: zero mean, uncorrelated on the clips it was fitted on."""
        return (latents.float() - self.mean) @ self.projection

    def unnormalize(self, latents: Tensor) -> Tensor:
        """[..., model_dim] -> [..., stored_dim]: the least-squares reconstruction (exact on normalised latents)."""
        return latents.float() @ self.inverse + self.mean

    def fit(self, moments: "StreamingMoments") -> None:
        """Principal components of the covariance; each component's largest entry is made positive."""
        stored_dim, model_dim = self.projection.shape
        eigenvalues, vectors = torch.linalg.eigh(moments.covariance())
        kept = torch.arange(stored_dim - 1, stored_dim - 1 - model_dim, -1)
        variances, components = eigenvalues[kept], vectors[:, kept]
        # Below what float64 sums can resolve, a component is a rounding error and not a direction.
        if not bool((variances > 1e-10 * eigenvalues[-1]).all()):
            raise ValueError(f"these latents vary in fewer than {model_dim} directions; fit on more clips")
        largest = components.abs().argmax(dim=0)
        components = components * components.gather(0, largest[None]).sign()
        scales = (variances + WHITENING_RIDGE * eigenvalues.sum()).sqrt()
        scales = scales * (variances / scales.square()).mean().sqrt()
        self.mean.copy_(moments.mean())
        self.projection.copy_(components / scales)
        self.inverse.copy_(components.T * scales[:, None])


class StreamingMoments:
    """Mean, std and covariance of tokens that come clip by clip; float64 sums on the CPU."""

    def __init__(self, dim: int, *, with_covariance: bool) -> None:
        """`with_covariance=False` keeps squares of the channels only."""
        self.num_tokens = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.squares = torch.zeros((dim, dim) if with_covariance else (dim,), dtype=torch.float64)

    def update(self, tokens: Tensor) -> None:
        """Add the tokens [B, L, dim] of B clips, one clip after another."""
        for clip in tokens.detach().to("cpu", torch.float64):
            self.num_tokens += clip.shape[0]
            self.total += clip.sum(dim=0)
            self.squares += clip.T @ clip if self.squares.ndim == 2 else clip.square().sum(dim=0)

    def mean(self) -> Tensor:
        """Mean [dim], float64; ValueError before two tokens were seen."""
        if self.num_tokens < 2:
            raise ValueError("cannot fit statistics on fewer than two tokens; the training split is empty")
        return self.total / self.num_tokens

    def covariance(self) -> Tensor:
        """Unbiased covariance [dim, dim], float64."""
        mean = self.mean()
        return (self.squares / self.num_tokens - torch.outer(mean, mean)) * self._bessel()

    def std(self) -> Tensor:
        """Unbiased std [dim], float64."""
        mean = self.mean()
        squares = self.squares.diagonal() if self.squares.ndim == 2 else self.squares
        return ((squares / self.num_tokens - mean.square()).clamp(min=0) * self._bessel()).sqrt()

    def _bessel(self) -> float:
        return self.num_tokens / (self.num_tokens - 1)


@torch.no_grad()
def install_condition_statistics(network: MMDiT, clip: StreamingMoments, sync: StreamingMoments) -> None:
    """Write fitted statistics into the network, and start its nulls at the mean features (0 when standardised)."""
    statistics = network.condition_statistics
    if not isinstance(statistics, ConditionStatistics):
        raise ValueError("this size takes its conditions as they are; only the tiny size standardises them")
    for moments, mean, std, empty in (
        (clip, statistics.clip_mean, statistics.clip_std, network.empty_clip_feat),
        (sync, statistics.sync_mean, statistics.sync_std, network.empty_sync_feat),
    ):
        fitted = moments.std()
        mean.copy_(moments.mean())
        std.copy_(fitted.clamp(min=max(RELATIVE_STD_FLOOR * fitted.mean().item(), torch.finfo(torch.float32).eps)))
        empty.copy_(moments.mean())
