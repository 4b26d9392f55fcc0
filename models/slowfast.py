"""SlowFast trunks for picture and for sound, one code for both and for every size.

Two streams read the same signal: *slow* sees every alpha-th step with many channels (what is there), *fast* sees every
step with few channels (when it happens). After the stem and after the stages the fast stream is handed to the slow one
through a lateral convolution that strides time by alpha. Feichtenhofer et al. 2019 (video, R50) and Kazakos et al. 2021
(sound: separable kernels, a stem that strides time as well).

Layout: a video is [B, C, T, H, W], a log-mel spectrogram [B, C, T, F]: time is always the first axis after the
channels, so that a picture has two *space* axes and a sound one. Every convolution pads time by repeating its edge
steps: zeros would mark the borders, and a reward could then tell a position without looking at the content. Space is
padded by zeros.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATERAL_RATIO = 2

NormKind = Literal["batch", "fitted"]
BlockKind = Literal["bottleneck", "basic"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One residual stage of both streams; widths are output channels, kernels are lengths in time steps."""

    slow_width: int
    fast_width: int
    num_blocks: int
    slow_kernel: int
    fast_kernel: int
    space_stride: int


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """A SlowFast trunk. `space_dims` is 2 for pictures and 1 for spectrograms."""

    space_dims: int
    in_channels: int
    slow_stem_width: int
    fast_stem_width: int
    fast_stem_kernel: int
    """Time steps of the fast stem's kernel; the slow stem's is always 1."""
    stem_space_kernel: int
    stem_time_stride: int
    """1 keeps every step; 2 strides time in the stem's convolution and again in its pooling (by 4 in all)."""
    alpha: int
    """Time steps of the fast stream for one of the slow stream."""
    lateral_kernel: int
    lateral_after_last: bool
    """Whether the last stage hands its fast stream over as well."""
    block: BlockKind
    norm: NormKind
    """`batch` is what the published trunks use, `fitted` does without statistics of the batch (`FittedNorm`)."""
    stages: tuple[StageConfig, ...]

    @property
    def slow_out(self) -> int:
        """Channels of the slow output, with the last lateral's where there is one."""
        last = self.stages[-1]
        return last.slow_width + (LATERAL_RATIO * last.fast_width if self.lateral_after_last else 0)

    @property
    def fast_out(self) -> int:
        """Channels of the fast output."""
        return self.stages[-1].fast_width


class FittedNorm(nn.Module):
    """Batch norm whose statistics are fitted once, on real clips before the first step, and then stay.

    A clip's features then depend on nothing but the clip: not on its batch, the number of ranks or train and eval mode,
    nor, as with group norm, on what else happens in it. In trials the tiny size learned to retrieve about as fast as
    with batch norm, and several times faster than with group norm.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, *, affine: bool = True) -> None:
        """`affine=False` leaves out the learned weight and bias."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.is_fitting = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        if self.is_fitting:
            with torch.no_grad():
                by_channel = x.detach().double().transpose(0, 1).flatten(1)
                self.mean.copy_(by_channel.mean(dim=1))
                self.variance.copy_(by_channel.var(dim=1))
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, training=False, eps=1e-5)


@contextmanager
def fitting(module: nn.Module) -> Iterator[None]:
    """Let every `FittedNorm` in `module` take its statistics from what passes through it, without gradient."""
    norms = [m for m in module.modules() if isinstance(m, FittedNorm)]
    for norm in norms:
        norm.is_fitting = True
    try:
        with torch.no_grad():
            yield
    finally:
        for norm in norms:
            norm.is_fitting = False


def _norm(kind: NormKind, channels: int, space_dims: int) -> nn.Module:
    if kind == "fitted":
        return FittedNorm(channels)
    return nn.BatchNorm3d(channels) if space_dims == 2 else nn.BatchNorm2d(channels)


def _conv(
    space_dims: int,
    in_channels: int,
    out_channels: int,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
) -> nn.Module:
    """Bias-free convolution with (time, space) kernel and stride; time is padded by its edge steps, space by zeros."""
    (time, space), half = kernel, kernel[1] // 2
    if space_dims == 2:
        sizes, strides = (time, space, space), (stride[0], stride[1], stride[1])
        conv = nn.Conv3d(in_channels, out_channels, sizes, strides, (0, half, half), bias=False)
    else:
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, (0, half), bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(ReplicateTime(time // 2), conv) if time > 1 else conv


class ReplicateTime(nn.Module):
    """Repeat the first and the last time step `steps` times: [B, C, T, ...] -> [B, C, T + 2 * steps, ...]."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        """Pad time by its edge values."""
        repeats = [-1] * x.ndim
        repeats[2] = self.steps
        return torch.cat([x[:, :, :1].expand(repeats), x, x[:, :, -1:].expand(repeats)], dim=2)


class Stem(nn.Module):
    """Convolution, norm, ReLU and 3 x 3 max-pool; strides space by 4, and time by 1 or 4."""

    def __init__(self, config: TrunkConfig, *, width: int, time_kernel: int) -> None:
        super().__init__()
        dims, stride = config.space_dims, config.stem_time_stride
        self.conv = _conv(
            dims,
            config.in_channels,
            width,
            kernel=(time_kernel, config.stem_space_kernel),
            stride=(stride, 2),
        )
        self.norm = _norm(config.norm, width, dims)
        # A pool pads with -inf, which for a maximum is the same as repeating the edge.
        pool_type = nn.MaxPool3d if dims == 2 else nn.MaxPool2d
        time_pool = 3 if stride == 2 else 1
        self.pool = pool_type(
            (time_pool,) + (3,) * dims,
            stride=(stride,) + (2,) * dims,
            padding=(time_pool // 2,) + (1,) * dims,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, space...] -> [B, width, T or T/4, space/4...]."""
        return self.pool(torch.relu(self.norm(self.conv(x))))


class ResidualBlock(nn.Module):
    """`bottleneck`: time, space and 1 x 1 kernels through a quarter of the width; `basic`: time and space kernel."""

    def __init__(
        self,
        config: TrunkConfig,
        in_channels: int,
        out_channels: int,
        *,
        time_kernel: int,
        space_stride: int,
        project: bool,
    ) -> None:
        super().__init__()
        dims, norm = config.space_dims, config.norm
        bottleneck = config.block == "bottleneck"
        inner = out_channels // 4 if bottleneck else out_channels
        layers: list[nn.Module] = [
            _conv(dims, in_channels, inner, kernel=(time_kernel, 1)),
            _norm(norm, inner, dims),
            nn.ReLU(inplace=True),
            _conv(dims, inner, inner, kernel=(1, 3), stride=(1, space_stride)),
            _norm(norm, inner, dims),
        ]
        if bottleneck:
            layers += [
                nn.ReLU(inplace=True),
                _conv(dims, inner, out_channels, kernel=(1, 1)),
                _norm(norm, out_channels, dims),
            ]
        last_norm = layers[-1]
        assert isinstance(last_norm.weight, nn.Parameter)
        nn.init.zeros_(last_norm.weight)  # a block starts as its skip connection (B1)
        self.branch = nn.Sequential(*layers)
        self.skip = (
            nn.Sequential(
                _conv(dims, in_channels, out_channels, kernel=(1, 1), stride=(1, space_stride)),
                _norm(norm, out_channels, dims),
            )
            if project
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, T, space...] -> [B, out, T, space / stride...]."""
        return torch.relu(self.skip(x) + self.branch(x))


class Lateral(nn.Module):
    """Fast to slow: a convolution over time with stride alpha that doubles the channels, then norm and ReLU."""

    def __init__(self, config: TrunkConfig, channels: int) -> None:
        super().__init__()
        out_channels = LATERAL_RATIO * channels
        self.conv = _conv(
            config.space_dims,
            channels,
            out_channels,
            kernel=(config.lateral_kernel, 1),
            stride=(config.alpha, 1),
        )
        self.norm = _norm(config.norm, out_channels, config.space_dims)

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        """Return slow with the fast stream's summary concatenated to its channels."""
        return torch.cat([slow, torch.relu(self.norm(self.conv(fast)))], dim=1)


def _stage(
    config: TrunkConfig, in_channels: int, out_channels: int, stage: StageConfig, time_kernel: int
) -> nn.Sequential:
    blocks = [
        ResidualBlock(
            config,
            in_channels if index == 0 else out_channels,
            out_channels,
            time_kernel=time_kernel,
            space_stride=stage.space_stride if index == 0 else 1,
            project=index == 0,
        )
        for index in range(stage.num_blocks)
    ]
    return nn.Sequential(*blocks)


class SlowFast(nn.Module):
    """The trunk: stem, stages, laterals. The slow stream reads input steps 0, alpha, 2 alpha, ... (exact stride)."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        self.slow_stem = Stem(config, width=config.slow_stem_width, time_kernel=1)
        self.fast_stem = Stem(config, width=config.fast_stem_width, time_kernel=config.fast_stem_kernel)
        slow_width, fast_width = config.slow_stem_width, config.fast_stem_width
        self.slow_stages = nn.ModuleList()
        self.fast_stages = nn.ModuleList()
        self.laterals = nn.ModuleList()
        for stage in config.stages:
            self.laterals.append(Lateral(config, fast_width))
            slow_in = slow_width + LATERAL_RATIO * fast_width
            self.slow_stages.append(_stage(config, slow_in, stage.slow_width, stage, stage.slow_kernel))
            self.fast_stages.append(_stage(config, fast_width, stage.fast_width, stage, stage.fast_kernel))
            slow_width, fast_width = stage.slow_width, stage.fast_width
        if config.lateral_after_last:
            self.laterals.append(Lateral(config, fast_width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, T, space...] -> slow [B, slow_out, ceil(T'/alpha), ...], fast [B, fast_out, T', ...].

        T' is T, or ceil(T / 4) where the stem strides time.
        """
        assert x.ndim == 3 + self.config.space_dims, tuple(x.shape)
        slow, fast = self.slow_stem(x[:, :, :: self.config.alpha]), self.fast_stem(x)
        for index, (slow_stage, fast_stage) in enumerate(zip(self.slow_stages, self.fast_stages, strict=True)):
            slow = slow_stage(self.laterals[index](slow, fast))
            fast = fast_stage(fast)
        if self.config.lateral_after_last:
            slow = self.laterals[-1](slow, fast)
        return slow, fast


def _resnet50_stages(slow_kernels: Sequence[int], fast_kernels: Sequence[int]) -> tuple[StageConfig, ...]:
    """Stages res2 to res5 of the R50 trunks: widths 256 ... 2048, beta = 1/8, blocks 3, 4, 6, 3."""
    return tuple(
        StageConfig(
            slow_width=256 * 2**index,
            fast_width=32 * 2**index,
            num_blocks=num_blocks,
            slow_kernel=slow_kernels[index],
            fast_kernel=fast_kernels[index],
            space_stride=1 if index == 0 else 2,
        )
        for index, num_blocks in enumerate((3, 4, 6, 3))
    )


def base_trunk(kind: Literal["video", "audio"]) -> TrunkConfig:
    """Build the paper-scale trunk: SlowFast-R50, alpha 4, lateral kernel 7 (33.64 M); Auditory SlowFast (25.97 M)."""
    video = kind == "video"
    return TrunkConfig(
        space_dims=2 if video else 1,
        in_channels=3 if video else 1,
        slow_stem_width=64,
        fast_stem_width=8,
        fast_stem_kernel=5,
        stem_space_kernel=7,
        stem_time_stride=1 if video else 2,
        alpha=4,
        lateral_kernel=7,
        lateral_after_last=False,
        block="bottleneck",
        norm="batch",
        stages=_resnet50_stages((1, 1, 3, 3), (3, 3, 3, 3)),
    )


def tiny_trunk(kind: Literal["video", "audio"], fast_scale: int = 1) -> TrunkConfig:
    """Build the same structure with small numbers, for two CPU cores: three stages of one basic block.

    `fast_scale` multiplies the widths of the fast pathway.
    """
    video = kind == "video"
    widths = ((24, 8 * fast_scale, 1), (48, 12 * fast_scale, 3), (96, 24 * fast_scale, 3))
    return TrunkConfig(
        space_dims=2 if video else 1,
        in_channels=3 if video else 1,
        slow_stem_width=24,
        fast_stem_width=8 * fast_scale,
        fast_stem_kernel=5,
        stem_space_kernel=5,
        stem_time_stride=1 if video else 2,
        alpha=4,
        lateral_kernel=5,
        lateral_after_last=True,
        block="basic",
        norm="fitted",
        stages=tuple(
            StageConfig(
                slow_width=slow,
                fast_width=fast,
                num_blocks=1,
                slow_kernel=slow_kernel,
                fast_kernel=3,
                space_stride=1 if index == 0 else 2,
            )
            for index, (slow, fast, slow_kernel) in enumerate(widths)
        ),
    )
