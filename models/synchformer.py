"""Synchformer's visual encoder: when things happen in a video, as 8 vectors for every segment of 16 frames.

A video transformer whose blocks attend twice: along time (tokens of one location), then along space (tokens of one
frame), with a CLS token that sees and is seen by all. One further transformer layer then sums up the locations of every
frame. Names, shapes and arithmetic are those of the public Synchformer checkpoint as MMAudio (arXiv 2412.15322) uses
it, so that its weights load strictly. Our decision: both attentions are one module that only differs in how it groups
the tokens, and each reads its keys without a mask.

Legend: B clips; T frames; S segments; F = 8 time steps of a segment, each of two frames; P = 196 patches of a frame;
L = 1 + F P tokens (CLS first, then frame-major); D width. Frames are RGB at 25 a second, normalised to [-1, 1].
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

SEGMENT_FRAMES = 16
SEGMENT_STRIDE = 8
"""Frames from the start of one segment to the start of the next: neighbours share half their frames."""
FRAME_PX = 224
PATCH_PX = 16
FRAMES_PER_STEP = 2
STEPS = SEGMENT_FRAMES // FRAMES_PER_STEP
"""F, and the number of vectors that a segment gives."""
PATCHES = (FRAME_PX // PATCH_PX) ** 2
"""P."""
NORM_EPS = 1e-6

Axis = Literal["time", "space"]


@dataclass(frozen=True, kw_only=True)
class SynchformerConfig:
    """Widths and depth. The sizes of frames and segments are constants, the position embeddings depend on them."""

    width: int
    """D."""
    depth: int
    num_heads: int
    mlp_dim: int
    """Hidden width of every feed-forward, the aggregation's too."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}")


SYNCHFORMER = SynchformerConfig(width=768, depth=12, num_heads=12, mlp_dim=3072)
"""The public checkpoint's size."""


def segment_frames(frames: Tensor, length: int = SEGMENT_FRAMES, stride: int = SEGMENT_STRIDE) -> Tensor:
    """Overlapping segments of [B, T, 3, H, W] as a view [B, S, length, 3, H, W], S = (T - length) // stride + 1.

    Segment s holds the frames from `stride * s` on; frames after the last whole segment are not used. Nothing is
    copied, so segments share memory: do not write into them. Raises ValueError if not even one segment fits.
    """
    if frames.shape[1] < length:
        raise ValueError(f"{frames.shape[1]} frames are fewer than the {length} of a segment; give a longer clip")
    return rearrange(frames.unfold(1, length, stride), "b s c h w t -> b s t c h w")


class DividedAttention(nn.Module):
    """Attention along one axis of the tokens: time (one location) or space (one frame).

    The CLS query sees all L tokens; a patch's query sees CLS and the tokens of its own location, or of its own frame.
    """

    def __init__(self, width: int, num_heads: int, axis: Axis) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.axis = axis
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, num_steps: int) -> Tensor:
        """(B, 1 + F P, D) -> the same shape; `num_steps` is F."""
        batch = x.shape[0]
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.num_heads).unbind(0)
        cls = F.scaled_dot_product_attention(q[:, :, :1], k, v)

        pattern = "(b p) h f d" if self.axis == "time" else "(b f) h p d"
        queries, keys, values = (
            rearrange(tokens[:, :, 1:], f"b h (f p) d -> {pattern}", f=num_steps) for tokens in (q, k, v)
        )
        num_groups = queries.shape[0] // batch
        keys, values = (
            torch.cat([repeat(tokens[:, :, :1], "b h one d -> (b g) h one d", g=num_groups), grouped], dim=2)
            for tokens, grouped in ((k, keys), (v, values))
        )
        patches = F.scaled_dot_product_attention(queries, keys, values)
        patches = rearrange(patches, f"{pattern} -> b (f p) (h d)", b=batch, f=num_steps)
        return self.proj(torch.cat([rearrange(cls, "b h one d -> b one (h d)"), patches], dim=1))


class FeedForward(nn.Module):
    """Two linear maps with the exact GELU (not its tanh approximation) between them."""

    def __init__(self, width: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class DividedBlock(nn.Module):
    """Pre-norm block: attention along time, attention along space, feed-forward, each added to the stream."""

    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, NORM_EPS)
        self.attn = DividedAttention(config.width, config.num_heads, "space")
        self.timeattn = DividedAttention(config.width, config.num_heads, "time")
        self.norm2 = nn.LayerNorm(config.width, NORM_EPS)
        self.mlp = FeedForward(config.width, config.mlp_dim)
        self.norm3 = nn.LayerNorm(config.width, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D). The norms are numbered as in the checkpoint, not in the order of their use."""
        x = x + self.timeattn(self.norm3(x), STEPS)
        x = x + self.attn(self.norm1(x), STEPS)
        return x + self.mlp(self.norm2(x))


class SpatialAggregation(nn.Module):
    """A pre-norm transformer layer over a learned token and the patches of one frame, of which that token is kept."""

    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        # Its names are the checkpoint's, and it calls scaled_dot_product_attention when no weights are asked for.
        self.self_attn = nn.MultiheadAttention(config.width, config.num_heads, batch_first=True)
        self.linear1 = nn.Linear(config.width, config.mlp_dim)
        self.linear2 = nn.Linear(config.mlp_dim, config.width)
        self.norm1 = nn.LayerNorm(config.width, NORM_EPS)
        self.norm2 = nn.LayerNorm(config.width, NORM_EPS)

    def forward(self, patches: Tensor) -> Tensor:
        """(frames, P, D) -> (frames, D). Only the learned token asks: what the patches would get is thrown away."""
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        tokens = self.norm1(torch.cat([cls, patches], dim=1))
        attended, _ = self.self_attn(tokens[:, :1], tokens, tokens, need_weights=False)
        cls = cls + attended
        return (cls + self.linear2(F.gelu(self.linear1(self.norm2(cls)))))[:, 0]


class TubeletEmbedding(nn.Module):
    """Cuts a segment into blocks of 2 frames x 16 x 16 pixels and maps each linearly to a token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        kernel = (FRAMES_PER_STEP, PATCH_PX, PATCH_PX)
        self.proj = nn.Conv3d(3, width, kernel, stride=kernel)

    def forward(self, segments: Tensor) -> Tensor:
        """(B, 16, 3, 224, 224) -> (B, F, P, D), patches row by row."""
        return rearrange(self.proj(rearrange(segments, "b t c h w -> b c t h w")), "b d f h w -> b f (h w) d")


class VisualEncoder(nn.Module):
    """Everything under the checkpoint's prefix `vfeat_extractor`: one segment -> F vectors."""

    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + PATCHES, width))
        self.temp_embed = nn.Parameter(torch.zeros(1, STEPS, width))
        # Nothing reads it: a picture model's embedding, which the video model was started from and which is still in
        # the public file. It is here because a strict load is worth more to us than 0.6 M numbers.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH_PX, PATCH_PX)}).requires_grad_(False)
        self.patch_embed_3d = TubeletEmbedding(width)
        self.blocks = nn.ModuleList(DividedBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.spatial_attn_agg = SpatialAggregation(config)

    def embed(self, segments: Tensor) -> Tensor:
        """(B, 16, 3, 224, 224) -> tokens (B, L, D). A patch has a place and a time, CLS a place of its own alone."""
        places = rearrange(self.pos_embed[:, 1:], "1 p d -> 1 1 p d")
        times = rearrange(self.temp_embed, "1 f d -> 1 f 1 d")
        patches = self.patch_embed_3d(segments) + (places + times)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(segments.shape[0], -1, -1)
        return torch.cat([cls, rearrange(patches, "b f p d -> b (f p) d")], dim=1)

    def forward(self, segments: Tensor) -> Tensor:
        """(B, 16, 3, 224, 224) -> (B, F, D)."""
        x = self.embed(segments)
        for block in self.blocks:
            x = block(x)
        frames = rearrange(self.norm(x[:, 1:]), "b (f p) d -> (b f) p d", f=STEPS)
        return rearrange(self.spatial_attn_agg(frames), "(b f) d -> b f d", f=STEPS)


class Synchformer(nn.Module):
    """The visual half of Synchformer. Frozen here: it has no dropout and is never trained, only loaded."""

    def __init__(self, config: SynchformerConfig) -> None:
        """Build with torch's default weights and zero embeddings, which mean nothing until weights are loaded."""
        super().__init__()
        self.config = config
        self.vfeat_extractor = VisualEncoder(config)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; inputs are cast to it."""
        return self.vfeat_extractor.cls_token.dtype

    def forward(self, segments: Tensor) -> Tensor:
        """Segments [B, S, 16, 3, 224, 224] in [-1, 1] -> [B, S, 8, D], each segment by itself."""
        batch = segments.shape[0]
        expected = (SEGMENT_FRAMES, 3, FRAME_PX, FRAME_PX)
        assert segments.ndim == 6, f"segments {tuple(segments.shape)}, expected [B, S, ...]"
        assert segments.shape[2:] == expected, f"segments {tuple(segments.shape)}, expected [B, S, *{expected}]"
        features = self.vfeat_extractor(rearrange(segments.to(self.dtype), "b s t c h w -> (b s) t c h w"))
        return rearrange(features, "(b s) f d -> b s f d", b=batch)

    @torch.no_grad()
    def encode_frames(self, frames: Tensor, segments_at_once: int = 8) -> Tensor:
        """Frames [B, T, 3, 224, 224] in [-1, 1] at 25 a second -> [B, 8 S, D]; 8 s (200 frames) give 192 vectors.

        Memory is bounded by `segments_at_once` segments of one clip, however many clips and frames there are: only
        these are copied, cast and kept as activations. Raises ValueError for fewer than 16 frames.
        """
        segments = segment_frames(frames)
        clips = [
            torch.cat([self(chunk) for chunk in clip.split(segments_at_once, dim=1)], dim=1)
            for clip in segments.split(1)
        ]
        return rearrange(torch.cat(clips), "b s f d -> b (s f) d")
