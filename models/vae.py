"""The mel VAE: log-mel spectrograms <-> latents at half their rate, as public MMAudio weights have it.

Parameter names, shapes and arithmetic are those of MMAudio's two autoencoders (arXiv 2412.15322). All layers preserve
magnitudes (Karras et al. 2024, arXiv 2312.02696): nothing has a bias, every row of a weight is brought to the same
length, and sums and activations are rescaled. Public files hold raw weights, so the one non-obvious step is
`fold_weights`: once after loading, in float32, before any `.to(dtype)`. `vae_from_public` does load and fold.

Legend: B clips; M mel bins; T mel frames, even; L = T / 2 latent tokens; C latent channels; W narrowest width.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.weights import load_strict

WIDTH_MULTIPLIERS = (1, 2, 4)
"""Width of each level over W; level 0 is the one at the mel's rate."""

NORM_EPS = 1e-4
"""Added to the RMS, not inside its root; it shortens a raw weight of RMS 0.01 by 1 %, so it may not differ."""

ACTIVATION_LIMIT = 256.0
"""Block outputs are clamped to +- this."""

LOGVAR_RANGE = (-30.0, 20.0)
"""Log variances of the posterior are clamped to this."""


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Widths of one mel VAE."""

    num_mels: int
    """M."""
    latent_dim: int
    """C."""
    width: int
    """W, channels at the mel's rate; the middle has four times as many."""


VAE_SIZES: dict[str, VAEConfig] = {
    "16k": VAEConfig(num_mels=80, latent_dim=20, width=384),
    "44k": VAEConfig(num_mels=128, latent_dim=40, width=512),
}
"""The two public autoencoders, by the name of their clip spec and mel."""


def pixel_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x / (1e-4 + RMS of x over `dims`), evaluated in float32, in the dtype of x."""
    wide = x.float()
    rms = wide.square().mean(dim=dims, keepdim=True).sqrt()
    return (wide / (NORM_EPS + rms)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU(x) / 0.596: unit noise keeps its RMS (arXiv 2312.02696)."""
    return F.silu(x) / 0.596


def mp_sum(skip: Tensor, branch: Tensor) -> Tensor:
    """(0.7 skip + 0.3 branch) / sqrt(0.7^2 + 0.3^2): independent unit inputs give a unit sum (arXiv 2312.02696)."""
    return (0.7 * skip + 0.3 * branch) / 0.58**0.5


class MPConv1d(nn.Module):
    """Convolution over time without bias, stride 1 and the length kept; correct only after `fold`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        """`kernel_size` is odd; the raw weight [out, in, k] starts as unit noise."""
        super().__init__()
        assert kernel_size % 2 == 1, f"kernel_size must be odd to keep the length, got {kernel_size}"
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size))

    @torch.no_grad()
    def fold(self) -> None:
        """Replace the raw weight by the one to convolve with: each output's row at an RMS of 1 / sqrt(in * k)."""
        _, in_channels, kernel_size = self.weight.shape
        unit = pixel_norm(self.weight.float(), (1, 2))
        self.weight.copy_(unit / (in_channels * kernel_size) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, L) -> (B, out, L)."""
        return F.conv1d(x, self.weight, padding=self.weight.shape[-1] // 2)


class ResBlock(nn.Module):
    """Two convolutions (k = 3) beside a shortcut, on the input normalised over channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """The shortcut is a 1x1 convolution where the widths differ."""
        super().__init__()
        self.conv1 = MPConv1d(in_channels, out_channels, 3)
        self.conv2 = MPConv1d(out_channels, out_channels, 3)
        self.nin_shortcut = MPConv1d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, L) -> (B, out, L)."""
        x = pixel_norm(x, (1,))
        branch = self.conv2(mp_silu(self.conv1(mp_silu(x))))
        skip = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return mp_sum(skip, branch)


class AttentionBlock(nn.Module):
    """Self-attention over time, one head as wide as the stream."""

    def __init__(self, channels: int) -> None:
        """q, k and v come from one convolution."""
        super().__init__()
        self.qkv = MPConv1d(channels, 3 * channels, 1)
        self.proj_out = MPConv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, L) -> the same."""
        # q, k, v alternate from channel to channel: public weights are laid out so.
        q, k, v = pixel_norm(rearrange(self.qkv(x), "b (c j) l -> j b l c", j=3), (-1,))
        attended = F.scaled_dot_product_attention(q, k, v)
        return mp_sum(x, self.proj_out(rearrange(attended, "b l c -> b c l")))


class Middle(nn.Module):
    """The widest part of both halves: a block, attention over time, a block."""

    def __init__(self, channels: int) -> None:
        """Width in and out."""
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, L) -> the same."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Half the rate: the mean of two frames between two 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        """Width in and out."""
        super().__init__()
        self.conv1 = MPConv1d(channels, channels, 1)
        self.conv2 = MPConv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, T) -> (B, channels, T / 2)."""
        return self.conv2(F.avg_pool1d(self.conv1(x), 2))


class Upsample(nn.Module):
    """Twice the rate: every frame twice, then a convolution (k = 3)."""

    def __init__(self, channels: int) -> None:
        """Width in and out."""
        super().__init__()
        self.conv = MPConv1d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, L) -> (B, channels, 2 L)."""
        return self.conv(repeat(x, "b c l -> b c (l r)", r=2))


class Level(nn.Module):
    """Residual blocks of one width, clamped, and perhaps a change of rate after them."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int) -> None:
        """The first block changes the width."""
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResBlock(before, after) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, L) -> (B, out, L)."""
        for block in self.block:
            x = block(x).clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)
        return x


class DownLevel(Level):
    """A level that then halves the rate."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int) -> None:
        """As `Level`."""
        super().__init__(in_channels, out_channels, num_blocks)
        self.downsample = Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, T) -> (B, out, T / 2)."""
        return self.downsample(super().forward(x))


class UpLevel(Level):
    """A level that then doubles the rate."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int) -> None:
        """As `Level`."""
        super().__init__(in_channels, out_channels, num_blocks)
        self.upsample = Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, L) -> (B, out, 2 L)."""
        return self.upsample(super().forward(x))


class Encoder(nn.Module):
    """Normalised mel -> moments; the rate halves after level 0."""

    def __init__(self, config: VAEConfig) -> None:
        """Two blocks a level."""
        super().__init__()
        w0, w1, w2 = (config.width * multiplier for multiplier in WIDTH_MULTIPLIERS)
        self.learnable_gain = nn.Parameter(torch.zeros([]))
        self.conv_in = MPConv1d(config.num_mels, w0, 3)
        self.down = nn.ModuleList([DownLevel(w0, w0, 2), Level(w0, w1, 2), Level(w1, w2, 2)])
        self.mid = Middle(w2)
        self.conv_out = MPConv1d(w2, 2 * config.latent_dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, T) in the weights' dtype -> mean and log variance (B, 2 C, T / 2) float32."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x).clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)
        return _gained(self.conv_out(mp_silu(x)), self.learnable_gain)


class Decoder(nn.Module):
    """Latents -> normalised mel, from the widest level down to level 0; the rate doubles after level 1."""

    def __init__(self, config: VAEConfig) -> None:
        """Three blocks a level."""
        super().__init__()
        w0, w1, w2 = (config.width * multiplier for multiplier in WIDTH_MULTIPLIERS)
        self.learnable_gain = nn.Parameter(torch.zeros([]))
        self.conv_in = MPConv1d(config.latent_dim, w2, 3)
        self.mid = Middle(w2)
        # Listed from level 0, as the names count; they run from the last to the first.
        self.up = nn.ModuleList([Level(w1, w0, 3), UpLevel(w2, w1, 3), Level(w2, w2, 3)])
        self.conv_out = MPConv1d(w0, config.num_mels, 3)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, L) in the weights' dtype -> (B, M, 2 L) float32."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return _gained(self.conv_out(mp_silu(x)), self.learnable_gain)


def _gained(x: Tensor, gain: Tensor) -> Tensor:
    """The output of a last convolution whose weight is multiplied by 1 + gain, in float32: without bias it commutes."""
    return x.float() * (1 + gain.float())


class MelVAE(nn.Module):
    """Encoder and decoder, and the statistics of the mels they were trained on.

    In and out are float32 whatever the weights' dtype. A state dict of a folded network must not be kept: it has the
    names of a public file, so whoever loads it would fold it again.
    """

    data_mean: Tensor
    data_std: Tensor
    folded: bool
    """Whether the weights in place have been folded; False again as soon as weights are loaded."""

    def __init__(self, config: VAEConfig) -> None:
        """Raw weights are unit noise, mel statistics NaN: both are to be loaded."""
        super().__init__()
        self.config = config
        self.register_buffer("data_mean", torch.full((1, config.num_mels, 1), float("nan")))
        self.register_buffer("data_std", torch.full((1, config.num_mels, 1), float("nan")))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.folded = False
        self.register_load_state_dict_post_hook(_mark_raw)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.encoder.learnable_gain.dtype

    def fold_weights(self) -> None:
        """Normalise every raw weight once, in place; does nothing more until weights are loaded again.

        The arithmetic is float32 in any dtype, but weights rounded before they are folded are rounded twice: fold
        first, then cast.
        """
        if self.folded:
            return
        for module in self.modules():
            if isinstance(module, MPConv1d):
                module.fold()
        self.folded = True

    def moments(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel [B, M, T], T even -> mean and log variance in [-30, 20] of the posterior, each [B, C, T / 2].

        Raises:
            RuntimeError: the weights are raw.
        """
        self._require_folded()
        assert mel.ndim == 3, f"mel is {tuple(mel.shape)}, expected [B, M, T]"
        assert mel.shape[1] == self.config.num_mels, f"{mel.shape[1]} mel bins, expected {self.config.num_mels}"
        assert mel.shape[2] % 2 == 0, f"{mel.shape[2]} mel frames are not a whole number of latent tokens"
        normalised = (mel.float() - self.data_mean.float()) / self.data_std.float()
        mean, logvar = self.encoder(normalised.to(self.dtype)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def encode(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel [B, M, T], T even -> mean and standard deviation of the posterior, each [B, C, T / 2] float32.

        Raises:
            RuntimeError: the weights are raw.
        """
        mean, logvar = self.moments(mel)
        return mean, (logvar / 2).exp()

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, L], not normalised -> log-mel [B, M, 2 L] float32.

        Raises:
            RuntimeError: the weights are raw.
        """
        self._require_folded()
        assert z.ndim == 3, f"latents are {tuple(z.shape)}, expected [B, C, L]"
        assert z.shape[1] == self.config.latent_dim, f"{z.shape[1]} channels, expected {self.config.latent_dim}"
        return self.decoder(z.to(self.dtype)) * self.data_std.float() + self.data_mean.float()

    def _require_folded(self) -> None:
        if not self.folded:
            raise RuntimeError("MelVAE has raw weights; call fold_weights() once after loading a public state dict")


def _mark_raw(vae: MelVAE, _incompatible_keys: object) -> None:
    vae.folded = False


def vae_from_public(config: VAEConfig, state_dict: dict[str, Tensor], source: str) -> MelVAE:
    """The frozen float32 VAE on the CPU of a public file's raw state dict, which is left as it is, strictly loaded.

    `source` says in the error where the weights are from.

    Raises:
        ValueError: a name is missing or unknown, or a shape is another.
    """
    # Built without memory first: noise for 300 million weights would be drawn only to be overwritten.
    with torch.device("meta"):
        vae = MelVAE(config)
    vae.to_empty(device="cpu")
    load_strict(vae, state_dict, source)
    vae.fold_weights()
    return vae.eval().requires_grad_(False)
