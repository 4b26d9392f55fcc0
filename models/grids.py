"""Conditions that need no weights: a coarse grid of colours, what changes in it, and hashed words.

Legend: T frames, 192 = 8 x 8 cells x RGB.
"""

import hashlib
import math
import re
import unicodedata

import numpy as np
from einops import reduce

GRID_RATE_HZ = 16
FRAME_PX = 64
CELLS = 8
_WORD_DIGITS = 64
"""A sha256 digest has 64 hexadecimal digits, one for each channel of a word's vector."""
_DIGIT_STD = math.sqrt((16**2 - 1) / 12)


def encode_frames(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [T, 64, 64, 3] -> semantics float32 [3, 192] and timing float32 [T, 576].

    Timing: means of each cell in [0, 1], their change since the frame before, and the mean absolute change of the
    cell's pixels (both 0 in frame 0). Semantics: mean, maximum and minimum over time of the cells' means.
    """
    pixels = frames.astype(np.int16)
    change = np.abs(np.diff(pixels, axis=0, prepend=pixels[:1]))
    means = _cell_means(frames)
    signed = np.diff(means, axis=0, prepend=means[:1])
    semantics = np.stack([means.mean(axis=0), means.max(axis=0), means.min(axis=0)])
    return semantics, np.concatenate([means, signed, _cell_means(change)], axis=1)


def _cell_means(pixels: np.ndarray) -> np.ndarray:
    """[T, 64, 64, 3] -> [T, 192] in [0, 1]; cell by cell, RGB last."""
    # Whole numbers are summed exactly, so the order is free: rows first, since numpy sums those fast.
    rows = reduce(pixels.astype(np.int32), "t (y h) w c -> t y w c", "sum", y=CELLS)
    sums = reduce(rows, "t y (x w) c -> t (y x c)", "sum", x=CELLS)
    return (sums / (255.0 * (FRAME_PX // CELLS) ** 2)).astype(np.float32)


def encode_caption(caption: str, length: int, width: int) -> np.ndarray:
    """Caption -> float32 [length, width <= 64]: a unit-variance vector for each word, zeros after the last one.

    A word's vector are the hexadecimal digits of its sha256: the same in every process, unrelated for different words.
    Case, punctuation and Unicode form do not matter; words past `length` are dropped.
    """
    assert width <= _WORD_DIGITS, f"width {width} exceeds the {_WORD_DIGITS} digits of a hash"
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", caption).casefold())[:length]
    vectors = np.zeros((length, width), np.float32)
    for i, word in enumerate(words):
        digits = [int(d, 16) for d in hashlib.sha256(word.encode()).hexdigest()[:width]]
        vectors[i] = (np.array(digits) - 7.5) / _DIGIT_STD
    return vectors
