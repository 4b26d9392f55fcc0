"""Windows over a sound of any length, and the joints between them.

Neighbouring windows are made independently of each other, so they are blended with equal power: in the middle of a
joint both sound at -3 dB, and a steady noise keeps its level across it.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np


def window_starts(total: int, window: int, overlap: int) -> list[int]:
    """First sample of each window: evenly spread, at least `overlap` (< window) shared by neighbours, all inside.

    A sound no longer than a window has one, from 0.
    """
    if not 0 <= overlap < window or total < 1:
        raise ValueError(f"overlap {overlap} must be within [0, window {window}), total {total} at least 1")
    if total <= window:
        return [0]
    count = -(-(total - overlap) // (window - overlap))
    return [round(i * (total - window) / (count - 1)) for i in range(count)]


def cross_faded(waves: Iterable[np.ndarray], starts: Sequence[int], total: int, fade: int) -> Iterator[np.ndarray]:
    """Blocks, none empty, that follow each other and make up `total` samples; holds two windows at a time.

    `waves` are float32 [window], one for each start, in order; neighbours share at least `fade` samples, and are
    blended over `fade` of them in the middle of what they share. Starts from `window_starts` with an overlap of
    fade + 1 fit where a window is at least 3 fades and 3 samples long.

    Raises:
        ValueError: windows start closer to each other than a fade, so that joints would run into each other.
    """
    nearest = min((b - a for a, b in pairwise(starts)), default=fade)
    # Two windows have one joint, which has nothing to run into.
    if len(starts) > 2 and nearest < fade:
        raise ValueError(f"windows start {nearest} samples apart, closer than a fade of {fade}; make the fade shorter")
    rise = np.sin(0.5 * np.pi * (np.arange(fade) + 0.5) / max(fade, 1)).astype(np.float32)
    previous, before, done = np.zeros(0, np.float32), 0, 0
    for start, wave in zip(starts, waves, strict=True):
        if len(previous):
            joint = start + (before + len(previous) - start - fade) // 2
            tail, head = previous[joint - before :][:fade], wave[joint - start :][:fade]
            if joint > done:
                yield previous[done - before : joint - before]
            if fade:
                yield tail * rise[::-1] + head * rise
            done = joint + fade
        previous, before = wave, start
    yield previous[done - before : total - before]
