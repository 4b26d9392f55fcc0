"""MM-DiT: the velocity field of the sound generator, with the named sizes of the public MMAudio checkpoints.

Parameter names, shapes and arithmetic are those of MMAudio (arXiv 2412.15322), so that its public weights load
strictly and give the same sound. One decision is ours: rotary tables and time frequencies are no buffers, they are
recomputed in float32, so any `.to(dtype)` and any change of lengths is safe. The tiny size also standardises its
hand-made conditions by statistics that are fitted before training; the named sizes have no such buffers.

Legend: B samples; S conditions, each serving B / S consecutive samples; N latent tokens;
Lc, Ls, Lt clip, sync and text tokens; C latent channels as the network sees them
(normalised); D hidden width; t flow time in [0, 1], 0 is noise and 1 is data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from models.block_runs import compile_each, run_block
from models.blocks import FinalLayer, JointBlock, SingleStreamBlock
from models.conditions import Conditions, ConditionStatistics
from models.layers import (
    ChannelLastConv1d,
    GatedMLP,
    HeadRMSNorm,
    TimeEmbedding,
    gated_hidden_dim,
    nearest_exact_upsample,
)
from models.rope import rotary_table

SYNC_SEGMENT = 8
"""Sync tokens come in segments of 8; each position inside a segment has a learned embedding."""

Features = tuple[Tensor, Tensor, Tensor]
"""(clip [B, Lc, clip_dim], sync [B, Ls, sync_dim], text [B, Lt, text_dim])."""


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Widths, depths and sequence lengths of one MM-DiT. Lengths may change later, weights do not depend on them."""

    latent_dim: int
    """C, channels of a normalised latent token."""
    clip_dim: int
    sync_dim: int
    text_dim: int
    hidden_dim: int
    """D."""
    num_heads: int
    depth: int
    """Joint and fused blocks together."""
    fused_depth: int
    """How many of `depth` are fused (latent stream only)."""
    latent_len: int
    clip_len: int
    sync_len: int
    text_len: int
    mlp_ratio: int = 4
    v2: bool = False
    """The second public generation: SiLU in every projection, and time frequencies up to 1e4."""
    standardise_conditions: bool = False
    """Standardise clip and sync features by fitted buffers (hand-made features only; public weights have none)."""

    def __post_init__(self) -> None:
        if not 0 < self.fused_depth < self.depth:
            raise ValueError(f"fused_depth must lie between 1 and depth - 1, got {self.fused_depth} of {self.depth}")
        if self.sync_len % SYNC_SEGMENT:
            raise ValueError(f"sync_len must be a multiple of {SYNC_SEGMENT}, got {self.sync_len}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_dim // self.num_heads


def _public(latent_dim: int, latent_len: int, hidden_dim: int, depth: int, *, v2: bool = False) -> MMDiTConfig:
    return MMDiTConfig(
        latent_dim=latent_dim,
        clip_dim=1024,
        sync_dim=768,
        text_dim=1024,
        hidden_dim=hidden_dim,
        num_heads=hidden_dim // 64,
        depth=depth,
        fused_depth=depth * 2 // 3,
        latent_len=latent_len,
        clip_len=64,
        sync_len=192,
        text_len=77,
        v2=v2,
    )


SIZES: dict[str, MMDiTConfig] = {
    "tiny": MMDiTConfig(
        latent_dim=32,
        clip_dim=192,
        sync_dim=576,
        text_dim=64,
        hidden_dim=64,
        num_heads=2,
        depth=4,
        fused_depth=2,
        latent_len=40,
        clip_len=3,
        sync_len=40,
        text_len=8,
        mlp_ratio=3,
        standardise_conditions=True,
    ),
    "small_16k": _public(20, 250, 448, 12),
    "small_44k": _public(40, 345, 448, 12),
    "medium_44k": _public(40, 345, 896, 12),
    "large_44k": _public(40, 345, 896, 21),
    "large_44k_v2": _public(40, 345, 896, 21, v2=True),
}
"""The sizes by name; `tiny` is the demo world's, the others are the public checkpoints'."""

SPEC_OF_SIZE: dict[str, str] = {
    "tiny": "tiny",
    "small_16k": "16k",
    "small_44k": "44k",
    "medium_44k": "44k",
    "large_44k": "44k",
    "large_44k_v2": "44k",
}
"""The `ClipSpec` (models/spec.py) that each size works on."""


class MMDiT(nn.Module):
    """The conditional velocity field v(x_t, t | clip, sync, text) of flow matching."""

    checkpoint_activations: bool
    """Training keeps the inputs of blocks only and computes what is inside again in backward: less memory, a third
    more arithmetic, the same losses and gradients."""

    def __init__(self, config: MMDiTConfig) -> None:
        """Build and initialise with torch's global generator; call `init_weights` with one of your own to repeat it."""
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.latent_len = config.latent_len
        self.clip_len = config.clip_len
        self.sync_len = config.sync_len
        dim, hidden_dim = config.hidden_dim, gated_hidden_dim(config.hidden_dim, config.mlp_ratio)

        self.sync_pos_emb = nn.Parameter(torch.zeros(1, 1, SYNC_SEGMENT, config.sync_dim))
        self.latent_mean = _frozen(torch.full((1, 1, config.latent_dim), float("nan")))
        self.latent_std = _frozen(torch.full((1, 1, config.latent_dim), float("nan")))
        self.empty_string_feat = _frozen(torch.zeros(config.text_len, config.text_dim))
        self.empty_clip_feat = nn.Parameter(torch.zeros(1, config.clip_dim))
        self.empty_sync_feat = nn.Parameter(torch.zeros(1, config.sync_dim))

        def silu_in_v2() -> list[nn.Module]:
            return [nn.SiLU()] if config.v2 else []

        def mlp(kernel_size: int | None) -> GatedMLP:
            return GatedMLP(dim, hidden_dim, kernel_size)

        conv_act = nn.SiLU if config.v2 else nn.SELU
        self.audio_input_proj = nn.Sequential(ChannelLastConv1d(config.latent_dim, dim, 7), conv_act(), mlp(7))
        self.clip_input_proj = nn.Sequential(nn.Linear(config.clip_dim, dim), *silu_in_v2(), mlp(3))
        self.sync_input_proj = nn.Sequential(ChannelLastConv1d(config.sync_dim, dim, 7), conv_act(), mlp(3))
        self.text_input_proj = nn.Sequential(nn.Linear(config.text_dim, dim), *silu_in_v2(), mlp(None))
        self.clip_cond_proj = nn.Linear(dim, dim)
        self.text_cond_proj = nn.Linear(dim, dim)
        self.global_cond_mlp = mlp(None)
        self.final_layer = FinalLayer(dim, config.latent_dim)
        self.t_embed = (
            TimeEmbedding(dim, frequency_dim=dim, max_period=1)
            if config.v2
            else TimeEmbedding(dim, frequency_dim=256, max_period=10_000)
        )
        num_joint = config.depth - config.fused_depth
        self.joint_blocks = nn.ModuleList(
            JointBlock(dim, config.num_heads, hidden_dim, pre_only=i == num_joint - 1) for i in range(num_joint)
        )
        self.fused_blocks = nn.ModuleList(
            SingleStreamBlock(dim, config.num_heads, hidden_dim, kernel_size=3) for _ in range(config.fused_depth)
        )
        self.condition_statistics = (
            ConditionStatistics(config.clip_dim, config.sync_dim) if config.standardise_conditions else None
        )
        self.init_weights(None)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """Initialise every weight from `generator` (None: torch's global one).

        Linear maps Xavier-uniform with zero bias, convolutions torch's default, the time MLP N(0, 0.02); all
        modulations, the final convolution, position embedding and nulls are zero, so that the network starts as
        v = 0. The latent statistics become NaN: they must be fitted or loaded.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias) if module.bias is not None else None
            elif isinstance(module, nn.Conv1d):
                _default_conv_init(module, generator)
            elif isinstance(module, HeadRMSNorm):
                nn.init.ones_(module.weight)
        for layer in (self.t_embed.mlp[0], self.t_embed.mlp[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02, generator=generator)
        zeroed = [name for name, _ in self.named_parameters() if "adaLN_modulation" in name]
        zeroed += ["final_layer.conv.weight", "final_layer.conv.bias"]
        zeroed += ["sync_pos_emb", "empty_clip_feat", "empty_sync_feat", "empty_string_feat"]
        for name in zeroed:
            nn.init.zeros_(self.get_parameter(name))
        nn.init.constant_(self.latent_mean, float("nan"))
        nn.init.constant_(self.latent_std, float("nan"))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; inputs are cast to it."""
        return self.sync_pos_emb.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.sync_pos_emb.device

    def set_lengths(self, latent_len: int, clip_len: int, sync_len: int) -> None:
        """Work on other lengths (another duration) from now on; `sync_len` is a multiple of 8."""
        if latent_len < 1 or clip_len < 1 or sync_len < SYNC_SEGMENT or sync_len % SYNC_SEGMENT:
            raise ValueError(
                f"lengths must be positive and sync_len a multiple of {SYNC_SEGMENT}, "
                f"got latent {latent_len}, clip {clip_len}, sync {sync_len}"
            )
        self.latent_len, self.clip_len, self.sync_len = latent_len, clip_len, sync_len

    def preprocess_conditions(self, clip_f: Tensor, sync_f: Tensor, text_f: Tensor) -> Conditions:
        """Project raw features (B, Lc | Ls | Lt, channels) of any float dtype into `Conditions`."""
        config = self.config
        batch = clip_f.shape[0]
        assert clip_f.shape == (batch, self.clip_len, config.clip_dim), f"clip features {tuple(clip_f.shape)}"
        assert sync_f.shape == (batch, self.sync_len, config.sync_dim), f"sync features {tuple(sync_f.shape)}"
        assert text_f.shape == (batch, config.text_len, config.text_dim), f"text features {tuple(text_f.shape)}"
        if self.condition_statistics is not None:
            clip_f, sync_f = self.condition_statistics(clip_f, sync_f)
        clip_f, sync_f, text_f = clip_f.to(self.dtype), sync_f.to(self.dtype), text_f.to(self.dtype)
        segments = rearrange(sync_f, "b (s p) d -> b s p d", p=SYNC_SEGMENT) + self.sync_pos_emb
        clip = self.clip_input_proj(clip_f)
        sync = self.sync_input_proj(rearrange(segments, "b s p d -> b (s p) d"))
        text = self.text_input_proj(text_f)
        return Conditions(
            clip=clip,
            sync=nearest_exact_upsample(sync, self.latent_len),
            text=text,
            clip_global=self.clip_cond_proj(clip.mean(dim=1)),
            text_global=self.text_cond_proj(text.mean(dim=1)),
        )

    def predict(self, latent: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Velocity (B, N, C) at latents x_t (B, N, C), times t [S] and projected conditions of S clips.

        S divides B: sample i belongs to condition and time i // (B / S). What depends on these alone is computed S
        times and not B times.
        """
        return self._velocity(self._embed_latent(latent), t, conditions)

    def _embed_latent(self, latent: Tensor) -> Tensor:
        expected = (self.latent_len, self.config.latent_dim)
        assert latent.shape[1:] == expected, f"latents {tuple(latent.shape)}, expected (B, *{expected})"
        return self.audio_input_proj(latent.to(self.dtype))

    def _velocity(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """What `predict` says, for latents that went through `audio_input_proj`: (B, N, D) -> (B, N, C)."""
        config, num_conditions = self.config, conditions.clip.shape[0]
        assert t.shape == (num_conditions,), f"times {tuple(t.shape)}, but {num_conditions} conditions"
        assert x.shape[0] % num_conditions == 0, f"{x.shape[0]} latents cannot share {num_conditions} conditions"
        global_vector = self.t_embed(t) + self.global_cond_mlp(conditions.clip_global + conditions.text_global)
        global_condition = global_vector[:, None]
        frame_condition = global_condition + conditions.sync
        latent_rope = rotary_table(self.latent_len, config.head_dim, 1.0, x.device)
        clip_rope = rotary_table(self.clip_len, config.head_dim, self.latent_len / self.clip_len, x.device)

        # From here on these streams see the latents, so every sample needs its own.
        per_condition = x.shape[0] // num_conditions
        clip, text = (
            repeat(stream, "s l d -> (s n) l d", n=per_condition) for stream in (conditions.clip, conditions.text)
        )
        streams = (x, clip, text)
        recompute = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        run = partial(run_block, self._blocks(), recompute=recompute)
        num_joint = len(self.joint_blocks)
        for i in range(num_joint):
            streams = run(i, streams, frame_condition, global_condition, (latent_rope, clip_rope))
        x = streams[0]
        for i in range(num_joint, config.depth):
            x = run(i, x, frame_condition, latent_rope)
        # The global condition and not the frame-aligned one: the public weights were trained so.
        return self.final_layer(x, global_condition)

    def _blocks(self) -> list[nn.Module]:
        return [*self.joint_blocks, *self.fused_blocks]

    def compile_blocks(self, backend: str | Callable[..., object] = "inductor") -> None:
        """Compile every block by `torch.compile` at its first call (models/block_runs.py).

        Where that fails (no C++ compiler, no Triton), the first call says so in one RuntimeWarning and the blocks run
        as they are. Names of weights stay; copies of the network (`copy.deepcopy`) are not compiled.
        """
        compile_each(self._blocks(), backend)

    def forward(self, latent: Tensor, clip_f: Tensor, sync_f: Tensor, text_f: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, N, C) at latents (B, N, C) and times [B] from raw features."""
        return self.predict(latent, t, self.preprocess_conditions(clip_f, sync_f, text_f))

    def empty_features(self, batch: int) -> Features:
        """The null conditions as raw features, expanded to `batch` clips."""
        return (
            repeat(self.empty_clip_feat, "1 d -> b l d", b=batch, l=self.clip_len),
            repeat(self.empty_sync_feat, "1 d -> b l d", b=batch, l=self.sync_len),
            repeat(self.empty_string_feat, "l d -> b l d", b=batch),
        )

    def replace_with_empty(self, features: Features, drop_video: Tensor, drop_text: Tensor) -> Features:
        """Replace the conditions of some samples by the nulls, with gradient to the nulls.

        `drop_video` bool [B]: clip and sync together; `drop_text` bool [B]: text. Training draws both independently
        with p = 0.1 (`flow_matching.sample_condition_drops`). The nulls take part in the graph even if no sample is
        dropped, so that every rank has a gradient for them.
        """
        empties = self.empty_features(features[0].shape[0])
        drops = (drop_video, drop_video, drop_text)
        clip_f, sync_f, text_f = (
            torch.where(drop[:, None, None], empty, feature.to(empty.dtype))
            for drop, empty, feature in zip(drops, empties, features, strict=True)
        )
        return clip_f, sync_f, text_f

    def guided_velocity(
        self, latent: Tensor, t: Tensor, conditions: Conditions, empty: Conditions, guidance: float
    ) -> Tensor:
        """Classifier-free guidance: w * v(conditions) + (1 - w) * v(empty); w <= 1 means the conditional alone.

        Shapes as in `predict`; `empty` holds the null conditions of one or all S clips, or a negative text in the
        place of the empty string. Both fields are one batch, and share what depends on the latents alone.
        """
        if guidance <= 1:
            return self.predict(latent, t, conditions)
        x = self._embed_latent(latent)
        both = self._velocity(torch.cat([x, x]), torch.cat([t, t]), conditions.joined(empty))
        conditional, unconditional = both.chunk(2)
        return guidance * conditional + (1 - guidance) * unconditional


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _default_conv_init(conv: nn.Conv1d, generator: torch.Generator | None) -> None:
    """What torch's own constructor does (weight and bias uniform in +-1 / sqrt(fan_in)), with a generator."""
    bound = (conv.in_channels * conv.kernel_size[0]) ** -0.5
    nn.init.uniform_(conv.weight, -bound, bound, generator=generator)
    if conv.bias is not None:
        nn.init.uniform_(conv.bias, -bound, bound, generator=generator)
