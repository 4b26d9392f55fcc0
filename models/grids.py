"""Conditions that need no weights: a coarse grid of colours, what changes in it, and hashed words.

Legend: T frames, 192 = 8 x 8 cells x RGB.
"""

import hashlib
import math
import re
import unicodedata

import numpy as np
from einops import rearrange

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
    change = np.zeros_like(frames)
    # Differences of unsigned bytes, in the order that cannot wrap around.
    change[1:] = np.maximum(frames[1:], frames[:-1]) - np.minimum(frames[1:], frames[:-1])
    means = _cell_means(frames)
    signed = np.diff(means, axis=0, prepend=means[:1])
    semantics = np.stack([means.mean(axis=0), means.max(axis=0), means.min(axis=0)])
    return semantics, np.concatenate([means, signed, _cell_means(change)], axis=1)


def _cell_means(pixels: np.ndarray) -> np.ndarray:
    """uint8 [T, 64, 64, 3] -> [T, 192] in [0, 1]; cell by cell, RGB last."""
    # Whole numbers are summed exactly, so the order is free, and a cell's sum fits into 16 bits. Adding whole slices
    # is four times faster than numpy's sum over short axes.
    side = FRAME_PX // CELLS
    rows = rearrange(pixels.astype(np.uint16), "t (y h) w c -> h t y w c", h=side)
    columns = rearrange(_added(rows), "t y (x w) c -> w t y x c", w=side)
    return (rearrange(_added(columns), "t y x c -> t (y x c)") / (255.0 * side**2)).astype(np.float32)


def _added(slices: np.ndarray) -> np.ndarray:
    """The sum over the first axis."""
    total = slices[0].copy()
    for one in slices[1:]:
        total += one
    return total


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
