import os
import subprocess
import sys

import numpy as np
import pytest

from models.grids import encode_caption, encode_frames


def test_a_cell_holds_its_own_colour() -> None:
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    # The cell in row 2, column 5.
    frames[:, 16:24, 40:48] = (255, 51, 0)
    _, timing = encode_frames(frames)
    grid = timing[0, :192].reshape(8, 8, 3)
    assert grid[2, 5] == pytest.approx([1.0, 0.2, 0.0])
    grid[2, 5] = 0
    assert not grid.any()


def test_a_change_shows_in_the_frame_in_which_it_happens_with_its_sign() -> None:
    frames = np.full((6, 64, 64, 3), 100, np.uint8)
    frames[3:, 0:8, 0:8] += 51
    frames[5:, 0:8, 0:8] -= 102
    _, timing = encode_frames(frames)
    signed, absolute = timing[:, 192], timing[:, 384]
    assert signed == pytest.approx([0, 0, 0, 0.2, 0, -0.4], abs=1e-6)
    assert absolute == pytest.approx([0, 0, 0, 0.2, 0, 0.4], abs=1e-6)


def test_movement_inside_a_cell_shows_only_in_the_absolute_differences() -> None:
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    frames[0, 1, 1] = 255
    frames[1, 5, 5] = 255
    _, timing = encode_frames(frames)
    assert not timing[1, 192:384].any()
    assert timing[1, 384] == pytest.approx(2 / 64)


def test_semantics_are_mean_maximum_and_minimum_over_time() -> None:
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    frames[1] = 255
    semantics, _ = encode_frames(frames)
    assert semantics.shape == (3, 192)
    assert semantics == pytest.approx(np.repeat([[0.25], [1.0], [0.0]], 192, axis=1))


def test_words_are_vectors_of_unit_variance_and_what_is_left_is_zero() -> None:
    text = encode_caption("A dog barks, twice!", 8, 64)
    assert text.shape == (8, 64)
    assert not text[4:].any()
    assert text[:4].std() == pytest.approx(1.0, abs=0.15)
    assert encode_caption("a DOG barks twice", 8, 64) == pytest.approx(text)
    assert abs(np.corrcoef(text[:4])[np.triu_indices(4, 1)]).max() < 0.5


def test_an_empty_caption_is_all_zeros_and_a_long_one_is_cut() -> None:
    assert not encode_caption("", 8, 64).any()
    assert encode_caption("one " * 20, 8, 64).any(axis=1).all()


def test_a_caption_has_the_same_vectors_in_every_process() -> None:
    code = "from models.grids import encode_caption; print(encode_caption('wind and rain', 8, 64).tobytes().hex())"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert other == encode_caption("wind and rain", 8, 64).tobytes().hex()
