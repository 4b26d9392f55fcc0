"""Held-out real pairs of picture and sound, as a reward takes them: for its calibration and its gates."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipelines.data.frames import decode_frames
from pipelines.data.media_write import decode_flac
from pipelines.data.store import Dataset


def real_pairs(features: Dataset, split: str) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Frames [1, T, 3, H, W] in [0, 1], wave [1, S] in [-1, 1] and rate in Hz of each clip of a split, as stored."""
    for group in features.iter_row_groups(["frames", "audio"], split):
        for frames, audio in zip(group["frames"].to_pylist(), group["audio"].to_pylist(), strict=True):
            picture = torch.from_numpy(decode_frames(frames)).permute(0, 3, 1, 2).float() / 255
            wave = torch.from_numpy(decode_flac(audio))
            yield picture[None], wave[None], features.spec.sample_rate_hz
