"""The two rules of alignment, against their plain statements."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.window import AudioTimeline, FrameGrid, FrameSampler


@given(
    st.lists(st.floats(-1, 4), min_size=1, max_size=30).map(sorted),
    st.sampled_from([4.0, 16.0, 25.0]),
)
@settings(max_examples=200, deadline=None)
def test_the_frame_shown_is_the_latest_that_is_due_and_before_the_first_the_first(
    times: list[float], rate_hz: float
) -> None:
    grid = FrameGrid(rate_hz=rate_hz, size_px=1, fit="stretch", num_frames=50)
    sampler: FrameSampler[int] = FrameSampler(grid, lambda index: np.full((1, 1, 3), index, np.uint8), 0.0)
    for index, time_s in enumerate(times):
        sampler.push(index, time_s)
    sampler.finish()
    expected = [max([i for i, t in enumerate(times) if t <= k / rate_hz], default=0) for k in range(50)]
    # Of several frames before the first wanted time, and none due, the first is shown.
    assert sampler.frames[:, 0, 0, 0].tolist() == expected
    assert sampler.done


def test_only_the_frames_that_are_kept_are_converted() -> None:
    converted: list[int] = []

    def convert(index: int) -> np.ndarray:
        converted.append(index)
        return np.zeros((1, 1, 3), np.uint8)

    sampler: FrameSampler[int] = FrameSampler(
        FrameGrid(rate_hz=8, size_px=1, fit="stretch", num_frames=16), convert, 0.0
    )
    for index in range(-30, 120):
        sampler.push(index, index / 30)
    sampler.finish()
    assert len(converted) == 16
    assert min(converted) == 0


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(-300, 900), st.floats(-0.0004, 0.0004))
@settings(max_examples=200, deadline=None)
def test_blocks_with_rounded_time_stamps_make_one_continuous_sound(
    sizes: list[int], start: int, jitter_s: float
) -> None:
    rate_hz, margin, length = 1000, 50, 600
    timeline = AudioTimeline(rate_hz, length, margin)
    signal = np.arange(1, sum(sizes) + 1, dtype=np.float32)
    position = 0
    for number, size in enumerate(sizes):
        time_s = (start + position) / rate_hz + (jitter_s if number else 0.0)
        timeline.place(signal[position : position + size], time_s)
        position += size
    expected = np.zeros(length + 2 * margin, np.float32)
    for index, value in enumerate(signal):
        place = start + index + margin
        if 0 <= place < len(expected):
            expected[place] = value
    np.testing.assert_array_equal(timeline.samples, expected)
    assert timeline.real_s == np.count_nonzero(expected[margin:-margin]) / rate_hz
