"""Passing frames over changes nothing that is shown: against a plain statement, and bit by bit on real files."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data import media, media_tracks
from pipelines.data.media_plan import LOOKAHEAD, FramePlan
from pipelines.data.window import DecodedWindow, FrameGrid, WindowRequest
from tests.pipelines.clip_factory import beep, write_clip

GRIDS = (
    FrameGrid(rate_hz=16, size_px=1, fit="stretch", num_frames=40),
    FrameGrid(rate_hz=3, size_px=1, fit="stretch", num_frames=7),
)


def shown(times: list[float], grids: tuple[FrameGrid, ...]) -> set[float]:
    return {
        max((t for t in times if t <= k / grid.rate_hz), default=min(times))
        for grid in grids
        for k in range(grid.num_frames)
    }


@given(st.lists(st.integers(-2000, 4000), min_size=1, max_size=80, unique=True), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_every_frame_that_a_grid_shows_is_decoded_and_with_little_reordering_no_other(stamps: list[int], draw) -> None:
    times = sorted(stamp / 1000 for stamp in stamps)
    # Decoding order: each frame at most a few places from where it is shown.
    order = sorted(times, key=lambda t: times.index(t) + draw.uniform(0, 4))
    plan: FramePlan[float] = FramePlan(GRIDS, 0.0)
    planned = [one for t in order for one in plan.push(t, t)] + list(plan.rest())
    assert [one.packet for one in planned] == order
    assert {one.packet for one in planned if one.shown} == shown(times, GRIDS)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=80, unique=True).flatmap(st.permutations))
@settings(max_examples=100, deadline=None)
def test_any_order_of_packets_only_makes_more_frames_decoded(stamps: list[int]) -> None:
    times = [stamp / 1000 for stamp in stamps]
    plan: FramePlan[float] = FramePlan(GRIDS, 0.0)
    planned = [one for t in times for one in plan.push(t, t)] + list(plan.rest())
    assert {one.packet for one in planned if one.shown} >= shown(times, GRIDS)


def test_packets_are_held_back_by_the_lookahead_and_no_more() -> None:
    plan: FramePlan[int] = FramePlan(GRIDS, 0.0)
    given = [len(list(plan.push(i, i / 30))) for i in range(LOOKAHEAD + 3)]
    assert given == [0] * LOOKAHEAD + [1, 1, 1]


def read(path: Path, start_s: float, rate_hz: float) -> DecodedWindow:
    grid = FrameGrid(rate_hz=rate_hz, size_px=32, fit="stretch", num_frames=int(2 * rate_hz))
    request = WindowRequest(
        start_s=start_s,
        duration_s=2.0,
        grids=(grid,),
        audio_rate_hz=16_000,
        audio_samples=32_000,
        max_pixels=1 << 22,
    )
    with path.open("rb") as file:
        return media.read_window(file, request)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("b.mp4", {"b_frames": 3}),
        ("b.mkv", {"b_frames": 3}),
        ("late.mp4", {"b_frames": 3, "offset_s": 0.7}),
        ("hevc.mp4", {"video_codec": "libx265"}),
        ("xvid.avi", {"video_codec": "mpeg4", "audio_codec": "libmp3lame"}),
    ],
)
def test_a_window_is_bit_for_bit_the_same_with_every_frame_decoded(
    tmp_path: Path, name: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (48, 64, 3), np.uint8)
    frames = [np.roll(base, 3 * i, axis=1) for i in range(180)]
    path = write_clip(tmp_path / name, frames, beep(6.0, 48_000, 3.0), frame_rate=30, group=45, **options)
    cases = [(start_s, rate_hz) for start_s in (0.0, 0.41, 3.03, 3.9) for rate_hz in (16, 5)]
    quick = [read(path, *case) for case in cases]
    monkeypatch.setattr(media_tracks, "SKIPPING_CODECS", frozenset())
    for case, found in zip(cases, quick, strict=True):
        whole = read(path, *case)
        np.testing.assert_array_equal(found.frames[0], whole.frames[0])
        np.testing.assert_array_equal(found.audio, whole.audio)  # pyright: ignore[reportArgumentType]
        assert found.valid_s == whole.valid_s


class CountingTrack:
    def __init__(self, original: Callable[[media_tracks.PictureTrack, Iterable[object]], None]) -> None:
        self.original = original
        self.count = 0

    def take(self, track: media_tracks.PictureTrack, frames: Iterable[object]) -> None:
        kept = list(frames)
        self.count += len(kept)
        self.original(track, kept)


def test_frames_that_nothing_builds_on_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [np.full((48, 64, 3), i, np.uint8) for i in range(120)]
    path = write_clip(tmp_path / "b.mp4", frames, beep(4.0, 48_000, 1.0), frame_rate=30, b_frames=3)
    counts, original = [], media_tracks.PictureTrack._take
    for codecs in (media_tracks.SKIPPING_CODECS, frozenset()):
        monkeypatch.setattr(media_tracks, "SKIPPING_CODECS", codecs)
        counted = CountingTrack(original)
        with monkeypatch.context() as patch:
            patch.setattr(media_tracks.PictureTrack, "_take", lambda self, found, c=counted: c.take(self, found))
            read(path, 0.0, 5)
        counts.append(counted.count)
    assert counts[0] < 0.75 * counts[1]
