"""Stored frames come back as they were written, and damage is named."""

import numpy as np
import pytest

from pipelines.data.frames import decode_frames, encode_jpeg
from pipelines.errors import MediaError


def picture(level: int) -> np.ndarray:
    ramp = np.linspace(0, level, 64).astype(np.uint8)
    return np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.uint8(level)), axis=-1)


def test_frames_come_back_in_order_and_nearly_unchanged() -> None:
    frames = np.stack([picture(level) for level in (60, 120, 240)])
    found = decode_frames([encode_jpeg(frame) for frame in frames])
    assert found.shape == frames.shape
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - frames).mean() < 3


def test_a_frame_that_is_no_jpeg_is_named() -> None:
    with pytest.raises(MediaError, match="frame 1 is not a JPEG"):
        decode_frames([encode_jpeg(picture(60)), b"\xff\xd8 and nothing more"])


def test_a_frame_that_is_cut_off_is_named() -> None:
    with pytest.raises(MediaError, match="truncated: frame 0"):
        decode_frames([encode_jpeg(picture(200))[:-200]])


def test_no_frames_and_frames_of_two_sizes_are_refused() -> None:
    with pytest.raises(MediaError, match="no frames"):
        decode_frames([])
    with pytest.raises(MediaError, match="sizes"):
        decode_frames([encode_jpeg(picture(60)), encode_jpeg(picture(60)[:32])])
