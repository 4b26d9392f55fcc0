"""CLIP's two towers as the generator's conditions want them: an embedding a frame, a hidden state a word piece.

The network is open_clip's; here is what is made of it. Names and shapes are those of open_clip checkpoints, so the
public DFN5B ViT-H-14 loads strictly.
"""

from dataclasses import dataclass
from typing import cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import Transformer, VisionTransformer
from torch import Tensor, nn

TEXT_TOKENS = 77
TOKENIZER = "ViT-H-14-378-quickgelu"
"""Of OpenAI's byte pairs, which all English CLIPs share; lower case, 77 tokens, padded with 0."""
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of RGB in [0, 1], OpenAI's."""


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Widths and depths of both towers. The image tower has a CLS token, both have pre-norm blocks and quick-GELU."""

    embed_dim: int
    """Of an image's embedding."""
    image_px: int
    """What the position grid is made for; other sizes with as many whole patches do as well."""
    patch_px: int
    image_width: int
    image_depth: int
    image_head_width: int
    text_width: int
    text_depth: int
    text_heads: int
    vocabulary: int = 49_408


CLIP_VIT_H_14 = CLIPConfig(
    embed_dim=1024,
    image_px=378,
    patch_px=14,
    image_width=1280,
    image_depth=32,
    image_head_width=80,
    text_width=1024,
    text_depth=24,
    text_heads=16,
)
"""DFN5B ViT-H-14 at 378 pixels. 384 give the same 27 x 27 patches: the last 6 pixels of both axes fall off."""


class FrozenCLIP(CLIP):
    """open_clip's CLIP with MMAudio's two ways to read it; loaded, never trained."""

    visual: VisionTransformer
    transformer: Transformer
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    ln_final: nn.LayerNorm

    def __init__(self, config: CLIPConfig) -> None:
        """Build with open_clip's random weights, which mean nothing until weights are loaded."""
        super().__init__(
            embed_dim=config.embed_dim,
            vision_cfg={  # pyright: ignore[reportArgumentType]  (open_clip takes both)
                "image_size": config.image_px,
                "layers": config.image_depth,
                "width": config.image_width,
                "head_width": config.image_head_width,
                "patch_size": config.patch_px,
            },
            text_cfg={  # pyright: ignore[reportArgumentType]
                "context_length": TEXT_TOKENS,
                "vocab_size": config.vocabulary,
                "width": config.text_width,
                "heads": config.text_heads,
                "layers": config.text_depth,
            },
            quick_gelu=True,
        )
        self.config = config
        # A buffer outside the state dict has no value after a load onto the meta device; it is made where it is used.
        self.register_buffer("attn_mask", None, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; inputs are cast to it."""
        return self.visual.conv1.weight.dtype

    @torch.no_grad()
    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """RGB in [0, 1] [B, 3, H, W], not normalised -> L2-normalised embeddings [B, embed_dim] float32."""
        patch = self.config.patch_px
        found, expected = (pixels.shape[2] // patch, pixels.shape[3] // patch), self.config.image_px // patch
        assert found == (expected, expected), f"{found} patches, the position grid has {expected} x {expected}"
        mean = pixels.new_tensor(PIXEL_MEAN)[:, None, None]
        std = pixels.new_tensor(PIXEL_STD)[:, None, None]
        embeddings = self.visual(((pixels - mean) / std).to(self.dtype))
        return F.normalize(embeddings.float(), dim=-1)

    @torch.no_grad()
    def text_states(self, captions: list[str]) -> Tensor:
        """Captions -> hidden states after the final LayerNorm, L2-normalised a token, [B, 77, text_width] float32.

        Neither pooled nor projected. Longer captions are cut to 77 tokens; padding is not masked, as in training.
        """
        tokens = tokenize(captions).to(self.positional_embedding.device)
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((TEXT_TOKENS, TEXT_TOKENS), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        x = self.ln_final(self.transformer(x, attn_mask=mask))
        return F.normalize(x.float(), dim=-1)


def tokenize(captions: list[str]) -> Tensor:
    """Captions -> token ids [B, 77] int64: start, word pieces, end, zeros."""
    return cast(Tensor, open_clip.get_tokenizer(TOKENIZER)(captions))
