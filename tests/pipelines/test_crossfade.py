"""Any length from fixed windows: nothing lost, nothing twice, no step at a joint."""

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.crossfade import cross_faded, window_starts


@settings(deadline=None)
@given(total=st.integers(1, 3000), window=st.integers(2, 400), data=st.data())
def test_windows_cover_everything_with_the_overlap_asked_for(total: int, window: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    starts = window_starts(total, window, overlap)
    assert starts[0] == 0
    if total <= window:
        assert starts == [0]
        return
    assert starts[-1] + window == total
    steps = np.diff(starts)
    # Rounding of evenly spread starts may cost one sample of overlap.
    assert steps.min() > 0 or window - overlap == 1
    assert steps.max() <= window - overlap + 1
    # One window fewer would not be enough.
    assert (len(starts) - 1) * (window - overlap) + overlap < total


@settings(deadline=None)
@given(total=st.integers(1, 3000), window=st.integers(60, 400), fade=st.integers(0, 19))
def test_the_result_has_exactly_the_length_and_keeps_what_lies_outside_the_joints(
    total: int, window: int, fade: int
) -> None:
    signal = np.random.default_rng(0).normal(size=total + window).astype(np.float32)
    starts = window_starts(total, window, overlap=fade + 1)
    blocks = list(cross_faded([signal[s : s + window] for s in starts], starts, total, fade))
    assert all(len(block) for block in blocks)
    joined = np.concatenate(blocks)
    assert joined.shape == (total,)
    same = np.isclose(joined, signal[:total])
    # Equal windows are only louder inside the joints: at most `fade` samples each.
    assert (~same).sum() <= fade * (len(starts) - 1)


def test_independent_noise_keeps_its_level_across_a_joint() -> None:
    rng = np.random.default_rng(0)
    window, fade, total = 4000, 2000, 6000
    starts = window_starts(total, window, fade)
    joints = [
        np.concatenate(
            list(cross_faded([rng.normal(size=window).astype(np.float32) for _ in starts], starts, total, fade))
        )
        for _ in range(40)
    ]
    level = np.sqrt(np.mean(np.square(joints), axis=0))
    inside = level[2000:4000].mean()
    assert inside == pytest.approx(level[:2000].mean(), rel=0.03)


def test_a_joint_goes_from_the_one_sound_to_the_other_without_a_step() -> None:
    waves = [np.full(100, 1.0, np.float32), np.full(100, -1.0, np.float32)]
    joined = np.concatenate(list(cross_faded(waves, window_starts(160, 100, 40), 160, 40)))
    assert joined[0] == 1.0
    assert joined[-1] == -1.0
    assert np.abs(np.diff(joined)).max() < 0.1


def test_a_window_is_asked_for_when_it_is_needed_and_let_go_after_its_joint() -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def waves() -> Iterator[np.ndarray]:
        for _ in range(50):
            wave = np.zeros(100, np.float32)
            alive.append(weakref.ref(wave))
            yield wave
            del wave

    starts = window_starts(50 * 80 + 20, 100, 20)
    assert len(starts) == 50
    done, held = 0, []
    for block in cross_faded(waves(), starts, 50 * 80 + 20, 10):
        done += len(block)
        # What is handed out ends within the window before the last one that was made, or in the joint of both.
        assert done <= starts[len(alive) - 1] + 100
        held.append(sum(ref() is not None for ref in alive))
    assert max(held) == 2
    assert len(alive) == 50


def test_an_overlap_as_long_as_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap 10"):
        window_starts(100, 10, 10)


def test_joints_that_would_run_into_each_other_are_refused() -> None:
    starts = window_starts(61, 40, 20)
    with pytest.raises(ValueError, match="closer than a fade of 19"):
        list(cross_faded([np.zeros(40, np.float32)] * len(starts), starts, 61, 19))
