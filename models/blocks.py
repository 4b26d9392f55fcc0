"""Transformer blocks of the MM-DiT: joint attention over three streams, single-stream blocks, the final layer.

Shapes: x (B, L, D) tokens of one stream; condition (S, L, D) for frame-aligned modulation or (S, 1, D) for a global
one, where S divides B and each condition serves B / S consecutive samples; q, k, v (B, heads, L, head_dim).
Formulas and names: MMAudio (arXiv 2412.15322), section 3 and its checkpoints.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.layers import ChannelLastConv1d, GatedMLP, HeadRMSNorm, Modulation, add_gated, layer_norm, modulate
from models.rope import apply_rotary


class QKV(NamedTuple):
    """Queries, keys and values of one stream, each (B, heads, L, head_dim) in one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor


class SelfAttention(nn.Module):
    """The projections of attention for one stream: q, k, v with QK norm and rotary embedding."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """`dim` must be a multiple of `num_heads`."""
        super().__init__()
        assert dim % num_heads == 0, f"width {dim} is not a multiple of {num_heads} heads"
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = HeadRMSNorm(dim // num_heads)
        self.k_norm = HeadRMSNorm(dim // num_heads)

    def forward(self, x: Tensor, rope: Tensor | None) -> QKV:
        """(B, L, D) -> QKV. In the projection's output q, k, v alternate fastest and heads slowest."""
        # The projection's order would leave q, k and v with strides that every later operation pays for: one copy.
        qkv = rearrange(self.qkv(x), "b l (h d three) -> three b h l d", h=self.num_heads, three=3).contiguous()
        q, k = self.q_norm(qkv[0]), self.k_norm(qkv[1])
        if rope is not None:
            q, k = apply_rotary(q, rope), apply_rotary(k, rope)
        return QKV(q.to(qkv.dtype), k.to(qkv.dtype), qkv[2])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a mask; heads concatenated: (B, heads, L, head_dim) -> (B, L, D)."""
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")


class SecondHalf(NamedTuple):
    """The last four modulation chunks, in their order: what a block needs after its attention."""

    gate_attention: Tensor
    shift: Tensor
    scale: Tensor
    gate: Tensor


class SingleStreamBlock(nn.Module):
    """One stream of a joint block, or a whole fused block: modulated attention, then a modulated feed-forward.

    `kernel_size=None` makes linear maps (text), 3 makes convolutions over time (latents, clip). A `pre_only` block
    gives q, k, v to others and has no second half: nothing reads its stream any more.
    """

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, kernel_size: int | None, *, pre_only: bool = False
    ) -> None:
        """Build the block; `hidden_dim` is the feed-forward's width."""
        super().__init__()
        self.pre_only = pre_only
        self.attn = SelfAttention(dim, num_heads)
        if not pre_only:
            self.linear1 = nn.Linear(dim, dim) if kernel_size is None else ChannelLastConv1d(dim, dim, kernel_size)
            self.ffn = GatedMLP(dim, hidden_dim, kernel_size)
        self.adaLN_modulation = Modulation(dim, 2 if pre_only else 6)

    def before_attention(self, x: Tensor, condition: Tensor, rope: Tensor | None) -> tuple[QKV, SecondHalf | None]:
        """QKV of the modulated stream, and what `after_attention` will need (None if pre-only)."""
        shift, scale, *second_half = self.adaLN_modulation.chunks(condition)
        qkv = self.attn(modulate(layer_norm(x), shift, scale), rope)
        return qkv, None if self.pre_only else SecondHalf(*second_half)

    def after_attention(self, x: Tensor, attended: Tensor, mlp: SecondHalf | None) -> Tensor:
        """Add the gated attention output and the gated feed-forward; a pre-only stream passes unchanged."""
        if mlp is None:
            return x
        x = add_gated(x, mlp.gate_attention, self.linear1(attended))
        return add_gated(x, mlp.gate, self.ffn(modulate(layer_norm(x), mlp.shift, mlp.scale)))

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor | None) -> Tensor:
        """The whole block on one stream: self-attention and feed-forward."""
        qkv, mlp = self.before_attention(x, condition, rope)
        return self.after_attention(x, attend(*qkv), mlp)


class JointBlock(nn.Module):
    """Latent, clip and text streams with their own parameters and one attention over all their tokens."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, *, pre_only: bool) -> None:
        """`pre_only` (the last joint block): clip and text only give q, k, v."""
        super().__init__()
        self.latent_block = SingleStreamBlock(dim, num_heads, hidden_dim, kernel_size=3)
        self.clip_block = SingleStreamBlock(dim, num_heads, hidden_dim, kernel_size=3, pre_only=pre_only)
        self.text_block = SingleStreamBlock(dim, num_heads, hidden_dim, kernel_size=None, pre_only=pre_only)

    def forward(
        self,
        streams: tuple[Tensor, Tensor, Tensor],
        frame_condition: Tensor,
        global_condition: Tensor,
        ropes: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update (latent, clip, text).

        The latent stream is modulated a token by `frame_condition` (S, N, D), the others by `global_condition`
        (S, 1, D); `ropes` are the tables of latent and clip, text has no positions.
        """
        latent, clip, text = streams
        latent_qkv, latent_mlp = self.latent_block.before_attention(latent, frame_condition, ropes[0])
        clip_qkv, clip_mlp = self.clip_block.before_attention(clip, global_condition, ropes[1])
        text_qkv, text_mlp = self.text_block.before_attention(text, global_condition, None)
        joined = [torch.cat(parts, dim=2) for parts in zip(latent_qkv, clip_qkv, text_qkv, strict=True)]
        lengths = [latent.shape[1], clip.shape[1], text.shape[1]]
        latent_out, clip_out, text_out = attend(*joined).split(lengths, dim=1)
        return (
            self.latent_block.after_attention(latent, latent_out, latent_mlp),
            self.clip_block.after_attention(clip, clip_out, clip_mlp),
            self.text_block.after_attention(text, text_out, text_mlp),
        )


class FinalLayer(nn.Module):
    """Modulated layer norm and a convolution (k = 7) to latent channels."""

    def __init__(self, dim: int, latent_dim: int) -> None:
        """D -> C."""
        super().__init__()
        self.adaLN_modulation = Modulation(dim, 2)
        self.conv = ChannelLastConv1d(dim, latent_dim, 7)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D), condition (S, 1, D) -> (B, N, C)."""
        shift, scale = self.adaLN_modulation.chunks(condition)
        return self.conv(modulate(layer_norm(x), shift, scale))
