"""BigVGAN vocoders: mel spectrogram -> sound, at the two sizes whose public weights MMAudio decodes with.

Names, shapes and arithmetic are those of the public weights (BigVGAN, arXiv 2206.04658; the 16 kHz ones come with
Make-An-Audio 2, the 44.1 kHz ones are BigVGAN-v2). One decision is ours: a network here holds plain weights only.
Weight normalisation serves training alone, so `fold_weight_norm` removes it from a published state dict once, before
loading.

Legend: B clips, M mel bins, F mel frames, C channels, T samples of a stage.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.antialiased import AntiAliasedSnakeBeta


@dataclass(frozen=True, kw_only=True)
class VocoderConfig:
    """Widths and rates of one BigVGAN."""

    num_mels: int
    """M."""
    initial_channels: int
    """Channels before the first stage; each stage halves them."""
    upsample_rates: tuple[int, ...]
    """How many times longer each stage makes its input."""
    upsample_kernels: tuple[int, ...]
    """Widths of the transposed convolutions, one a stage."""
    resblock_kernels: tuple[int, ...]
    """Each stage ends in the mean of residual blocks of these widths."""
    dilations: tuple[int, ...]
    """Of the convolution pairs inside every residual block."""
    final_tanh: bool
    """The sound is bounded to [-1, 1] by tanh, else by clamping."""
    final_bias: bool
    """The last convolution has a bias."""

    def __post_init__(self) -> None:
        if len(self.upsample_rates) != len(self.upsample_kernels):
            raise ValueError(f"{len(self.upsample_rates)} upsample_rates, but {len(self.upsample_kernels)} kernels")
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernels, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ValueError(f"an upsampling kernel must exceed its rate by an even number, got {kernel}, {rate}")
        if self.initial_channels % 2 ** len(self.upsample_rates):
            raise ValueError(
                f"initial_channels {self.initial_channels} cannot be halved {len(self.upsample_rates)} times"
            )
        if any(kernel % 2 == 0 for kernel in self.resblock_kernels):
            raise ValueError(f"resblock_kernels must be odd, got {self.resblock_kernels}")

    @property
    def hop(self) -> int:
        """Samples of sound a mel frame."""
        return math.prod(self.upsample_rates)


VOCODER_SIZES: dict[str, VocoderConfig] = {
    "16k": VocoderConfig(
        num_mels=80,
        initial_channels=1536,
        upsample_rates=(4, 4, 2, 2, 2, 2),
        upsample_kernels=(8, 8, 4, 4, 4, 4),
        resblock_kernels=(3, 7, 11),
        dilations=(1, 3, 5),
        final_tanh=True,
        final_bias=True,
    ),
    "44k": VocoderConfig(
        num_mels=128,
        initial_channels=1536,
        upsample_rates=(8, 4, 2, 2, 2, 2),
        upsample_kernels=(16, 8, 4, 4, 4, 4),
        resblock_kernels=(3, 7, 11),
        dilations=(1, 3, 5),
        final_tanh=False,
        final_bias=False,
    ),
}
"""The public vocoders by the name of the clip spec (models/spec.py) whose mels they read."""


def _same_conv(num_channels: int, kernel_size: int, dilation: int) -> nn.Conv1d:
    padding = dilation * (kernel_size - 1) // 2
    return nn.Conv1d(num_channels, num_channels, kernel_size, dilation=dilation, padding=padding)


class ResidualBlock(nn.Module):
    """For each dilation: activation, dilated convolution, activation, plain convolution, and the input again."""

    def __init__(self, num_channels: int, kernel_size: int, dilations: tuple[int, ...]) -> None:
        """Activations 2 i and 2 i + 1 belong to the pair of dilation i."""
        super().__init__()
        self.convs1 = nn.ModuleList(_same_conv(num_channels, kernel_size, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(_same_conv(num_channels, kernel_size, 1) for _ in dilations)
        self.activations = nn.ModuleList(AntiAliasedSnakeBeta(num_channels) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        pairs = zip(self.activations[::2], self.convs1, self.activations[1::2], self.convs2, strict=True)
        for before_dilated, dilated, before_plain, plain in pairs:
            x = x + plain(before_plain(dilated(before_dilated(x))))
        return x


class BigVGAN(nn.Module):
    """Log-mel spectrogram -> waveform, each stage upsampling by a transposed convolution."""

    def __init__(self, config: VocoderConfig) -> None:
        """Build with torch's default initialisation; a vocoder is of use with public weights only."""
        super().__init__()
        self.config = config
        channels = [config.initial_channels >> stage for stage in range(len(config.upsample_rates) + 1)]
        self.conv_pre = nn.Conv1d(config.num_mels, channels[0], 7, padding=3)
        # Lists of one, as the checkpoint's names `ups.i.0` say.
        self.ups = nn.ModuleList(
            nn.ModuleList(
                [nn.ConvTranspose1d(channels[i], channels[i + 1], kernel, stride=rate, padding=(kernel - rate) // 2)]
            )
            for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernels, strict=True))
        )
        # Flat, as the checkpoint numbers them: those of stage i are the i-th `len(resblock_kernels)`.
        self.resblocks = nn.ModuleList(
            ResidualBlock(num_channels, kernel, config.dilations)
            for num_channels in channels[1:]
            for kernel in config.resblock_kernels
        )
        self.activation_post = AntiAliasedSnakeBeta(channels[-1])
        self.conv_post = nn.Conv1d(channels[-1], 1, 7, padding=3, bias=config.final_bias)

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel [B, M, F] (`models.mel`, the front end of the same name) -> sound [B, 1, F * hop] in [-1, 1].

        Input must have the weights' dtype; the sound has it too.
        """
        assert mel.ndim == 3, f"mel is {tuple(mel.shape)}, expected [B, M, F]"
        assert mel.shape[1] == self.config.num_mels, f"mel has {mel.shape[1]} bins, expected {self.config.num_mels}"
        x = self.conv_pre(mel)
        num_blocks = len(self.config.resblock_kernels)
        for stage, (upsample,) in enumerate(self.ups):  # type: ignore[misc]
            x = upsample(x)
            blocks = self.resblocks[stage * num_blocks : (stage + 1) * num_blocks]
            x = sum(block(x) for block in blocks) / num_blocks
        wave = self.conv_post(self.activation_post(x))
        return wave.tanh() if self.config.final_tanh else wave.clamp(-1, 1)


GAIN_AND_DIRECTION = {
    "weight_g": "weight_v",
    "parametrizations.weight.original0": "parametrizations.weight.original1",
}
"""Name endings of a weight-normalised weight: torch's older and its newer way."""


def fold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict with plain weights: w = g · v / |v|, the norm over all dimensions but the first.

    Weight normalisation: Salimans and Kingma, arXiv 1602.07868. Folded weights are float32 whatever g and v are; every
    other tensor is handed on as it is, so that the result loads strictly.

    Raises:
        ValueError: a gain or direction without its other half, of another shape, beside a plain weight of the same
            name, or any other parametrisation is there. The message names it.
    """
    plain: dict[str, Tensor] = {}
    folded: set[str] = set()
    for gain_ending, direction_ending in GAIN_AND_DIRECTION.items():
        for name, gain in state.items():
            if not name.endswith(gain_ending):
                continue
            module = name.removesuffix(gain_ending)
            direction_name, weight_name = module + direction_ending, module + "weight"
            if direction_name not in state:
                raise ValueError(f"{name} has no {direction_name} beside it; give the whole published state dict")
            if weight_name in state or weight_name in plain:
                raise ValueError(f"{weight_name} is there twice, plain and as {name}; give one of the two")
            plain[weight_name] = _weight(name, gain, state[direction_name])
            folded |= {name, direction_name}
    rest = {name: tensor for name, tensor in state.items() if name not in folded}
    normalised = (*GAIN_AND_DIRECTION, *GAIN_AND_DIRECTION.values())
    leftovers = [name for name in rest if name.endswith(normalised) or "parametrizations." in name]
    if leftovers:
        raise ValueError(
            f"no weight can be made of {', '.join(sorted(leftovers))}; give the whole published state dict"
        )
    return rest | plain


def _weight(name: str, gain: Tensor, direction: Tensor) -> Tensor:
    """Gain [out, 1, ...] and direction [out, ...] -> weight [out, ...] float32."""
    expected = (direction.shape[0], *(1 for _ in direction.shape[1:]))
    if gain.shape != expected:
        raise ValueError(f"{name} is {list(gain.shape)}, expected {list(expected)}: one gain an entry of dimension 0")
    direction = direction.float()
    norm = torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.ndim)), keepdim=True)
    return direction * (gain.float() / norm)
