import numpy as np
import pytest

from models.encoders import build_encoders
from models.spec import SPECS


def random_frames(num_frames: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, 64, 64, 3), np.uint8)


def test_grid_conditions_have_the_shapes_of_the_spec_in_half_precision() -> None:
    spec = SPECS["tiny"]
    encoders = build_encoders("grids", spec)
    (grid,) = encoders.grids
    conditions = encoders.encode({grid: random_frames()}, "rain on a roof")
    assert {name: value.shape for name, value in conditions.items()} == {
        "clip_features": (spec.clip_len, spec.clip_dim),
        "sync_features": (spec.sync_len, spec.sync_dim),
        "text_features": (spec.text_len, spec.text_dim),
    }
    assert all(value.dtype == np.float16 and np.isfinite(value).all() for value in conditions.values())


def test_a_longer_clip_gives_a_longer_timing_condition_in_whole_segments() -> None:
    spec = SPECS["tiny"].with_duration(3.2)
    encoders = build_encoders("grids", spec)
    conditions = encoders.encode({encoders.grids[0]: random_frames(spec.frames_len)}, "")
    assert conditions["sync_features"].shape == (spec.sync_len, 576) == (48, 576)


def test_frames_of_another_number_are_refused() -> None:
    encoders = build_encoders("grids", SPECS["tiny"])
    with pytest.raises(ValueError, match=r"\(39, 64, 64, 3\).*\(40, 64, 64, 3\)"):
        encoders.encode({encoders.grids[0]: random_frames(39)}, "")


def test_unknown_encoders_and_a_spec_they_do_not_serve_are_named() -> None:
    with pytest.raises(ValueError, match=r"'clap'.*'clip_synchformer', 'grids'"):
        build_encoders("clap", SPECS["tiny"])
    with pytest.raises(ValueError, match="'16k'"):
        build_encoders("grids", SPECS["16k"])
