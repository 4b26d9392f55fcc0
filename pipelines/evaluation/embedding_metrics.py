"""Measures of embeddings and logits that the user's own networks made of generated and of real sound.

Fréchet distance, KL divergence and inception score are those of `metrics.py`; here is what only such networks ask for,
and the columns of MMAudio's table, each with the files it is computed from. Everything is float64.

Legend: B clips, D features, L labels, P patches, W windows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from einops import rearrange

from pipelines.evaluation.metrics import INCEPTION_SPLITS, frechet_distance, inception_score, kl_divergence

VGGISH_WIDTH = 128
"""Features of one 0.96 s patch."""
SYNC_OFFSETS = 21
"""Offsets that Synchformer tells apart: -2 s to 2 s in steps of 0.2 s."""
MAX_SYNC_OFFSET_S = 2.0

KINDS: dict[str, str] = {
    "passt_embeddings": "PaSST features of the sound (768)",
    "passt_logits": "PaSST logits of the sound (527)",
    "panns_embeddings": "PANNs Cnn14 features of the sound (2048)",
    "panns_logits": "PANNs Cnn14 logits of the sound (527), before the sigmoid",
    "vggish_embeddings": "VGGish features of the sound's patches one after another (P 128)",
    "imagebind_embeddings": "ImageBind embeddings: generated = of the generated sound, reference = of the picture",
    "synchformer_logits": "Synchformer's 21 offset logits of each window one after another (W 21); no reference",
}
"""Kind of file -> what one row of it holds."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingColumn:
    """One column of MMAudio's table; exactly one of `of_pair` and `of_generated` is there."""

    name: str
    kind: str
    better: Literal["up", "down"]
    meaning: str
    of_pair: Callable[[np.ndarray, np.ndarray], float] | None = None
    """(reference, generated), rows of the same clips in the same order -> value."""
    of_generated: Callable[[np.ndarray], float] | None = None
    """Generated rows -> value; the reference is not asked."""
    min_clips: int = 1
    """Below so many clips the measure is not defined."""


def cosine_mean(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pairs of the cosine of row i of `a` and row i of `b`, both [B >= 1, D]; in [-1, 1].

    Raises:
        ValueError: unequal shapes, no rows, or a row of zeros, which has no direction.
    """
    if a.shape != b.shape or a.ndim != 2 or len(a) == 0:
        raise ValueError(f"cosine wants two sets of equally many rows of one width, got {a.shape} and {b.shape}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if not norms.all():
        raise ValueError(f"{int((norms == 0).sum())} rows are all zeros and have no direction")
    return float(np.clip((a * b).sum(axis=1) / norms, -1.0, 1.0).mean())


def imagebind_score(reference: np.ndarray, generated: np.ndarray) -> float:
    """100 times `cosine_mean`, the unit of the published tables."""
    return 100 * cosine_mean(reference, generated)


def desync_s(logits: np.ndarray) -> float:
    """Mean |offset| in seconds of the likeliest of 21 offsets, over clips and windows; logits [B, W 21], in [0, 2].

    av-benchmark gives two windows a clip, the first and the last 14 segments (4.8 s) of its 8 s.

    Raises:
        ValueError: no rows, or a width that is not a multiple of 21.
    """
    if logits.size == 0 or logits.shape[1] % SYNC_OFFSETS:
        raise ValueError(f"offset logits want rows of a multiple of {SYNC_OFFSETS} values, got {logits.shape}")
    windows = rearrange(logits, "b (w offset) -> (b w) offset", offset=SYNC_OFFSETS)
    offsets_s = np.linspace(-MAX_SYNC_OFFSET_S, MAX_SYNC_OFFSET_S, SYNC_OFFSETS)
    return float(np.abs(offsets_s[windows.argmax(axis=1)]).mean())


def patch_frechet_distance(reference: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet distance of all 0.96 s patches of all clips, rows [B, P 128] of P patches one after another.

    Raises:
        ValueError: a width that is not a multiple of 128, or fewer than two patches.
    """
    if reference.shape[1] % VGGISH_WIDTH or generated.shape[1] % VGGISH_WIDTH:
        raise ValueError(
            f"VGGish rows want a multiple of {VGGISH_WIDTH} values, got {reference.shape} and {generated.shape}"
        )
    return frechet_distance(
        rearrange(reference, "b (p d) -> (b p) d", d=VGGISH_WIDTH),
        rearrange(generated, "b (p d) -> (b p) d", d=VGGISH_WIDTH),
    )


def _inception_mean(logits: np.ndarray) -> float:
    return inception_score(logits)[0]


COLUMNS: tuple[EmbeddingColumn, ...] = (
    EmbeddingColumn(
        name="FD_PaSST",
        kind="passt_embeddings",
        better="down",
        meaning="Fréchet distance of PaSST features to those of the real sounds",
        of_pair=frechet_distance,
        min_clips=2,
    ),
    EmbeddingColumn(
        name="FD_PANNs",
        kind="panns_embeddings",
        better="down",
        meaning="the same of PANNs features",
        of_pair=frechet_distance,
        min_clips=2,
    ),
    EmbeddingColumn(
        name="FD_VGG",
        kind="vggish_embeddings",
        better="down",
        meaning="the same of VGGish features, every 0.96 s patch for itself",
        of_pair=patch_frechet_distance,
        min_clips=2,
    ),
    EmbeddingColumn(
        name="KL_PANNs",
        kind="panns_logits",
        better="down",
        meaning="mean over clips of KL(softmax of the real sound || softmax of the generated one), PANNs",
        of_pair=kl_divergence,
    ),
    EmbeddingColumn(
        name="KL_PaSST",
        kind="passt_logits",
        better="down",
        meaning="the same by PaSST",
        of_pair=kl_divergence,
    ),
    EmbeddingColumn(
        name="IS",
        kind="panns_logits",
        better="up",
        meaning=f"inception score by PANNs, mean of {INCEPTION_SPLITS} splits of the clips sorted by id, then shuffled",
        of_generated=_inception_mean,
        min_clips=INCEPTION_SPLITS,
    ),
    EmbeddingColumn(
        name="IB-score",
        kind="imagebind_embeddings",
        better="up",
        meaning="100 times the mean cosine of ImageBind embeddings of picture and generated sound",
        of_pair=imagebind_score,
    ),
    EmbeddingColumn(
        name="DeSync",
        kind="synchformer_logits",
        better="down",
        meaning="mean |offset| between picture and generated sound by Synchformer, seconds",
        of_generated=desync_s,
    ),
)
"""MMAudio's columns in its order."""
