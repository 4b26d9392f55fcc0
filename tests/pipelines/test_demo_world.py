import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from pipelines.data.demo_world import (
    BALL_PITCH_HZ,
    LAMP_PITCH_HZ,
    SAMPLE_RATE_HZ,
    DemoClip,
    plan_clips,
    render_clip,
)

CLIPS = [render_clip(3, index) for index in range(80)]


def band_energy(clip: DemoClip, start_s: float, end_s: float, low_hz: float, high_hz: float) -> float:
    part = clip.wave[round(start_s * SAMPLE_RATE_HZ) : round(end_s * SAMPLE_RATE_HZ)].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)))) ** 2
    hz = np.fft.rfftfreq(len(part), 1 / SAMPLE_RATE_HZ)
    return float(spectrum[(hz >= low_hz) & (hz < high_hz)].sum())


def test_a_clip_has_the_shapes_and_ranges_of_the_world() -> None:
    for clip in CLIPS:
        assert clip.frames.shape == (40, 64, 64, 3)
        assert clip.frames.dtype == np.uint8
        assert clip.wave.shape == (40_000,)
        assert clip.wave.dtype == np.float32
        assert np.abs(clip.wave).max() < 0.95


def test_seed_and_index_alone_decide_a_clip() -> None:
    again, other_seed = render_clip(3, 5), render_clip(4, 5)
    assert np.array_equal(again.frames, CLIPS[5].frames)
    assert np.array_equal(again.wave, CLIPS[5].wave)
    assert again.events == CLIPS[5].events
    assert not np.array_equal(other_seed.wave, again.wave)
    assert not np.array_equal(CLIPS[6].wave, again.wave)


def test_clips_hold_two_or_three_kinds_with_one_to_three_events_each() -> None:
    for clip in CLIPS:
        kinds = [event.kind for event in clip.events]
        assert 2 <= len(set(kinds)) <= 3
        assert max(kinds.count(kind) for kind in set(kinds)) <= 3
        assert [e.time_s for e in clip.events] == sorted(e.time_s for e in clip.events)
    assert np.mean([len(clip.events) for clip in CLIPS]) == pytest.approx(4.7, abs=0.4)
    assert {e.variant for clip in CLIPS for e in clip.events} == {*BALL_PITCH_HZ, *LAMP_PITCH_HZ, "left", "right"}


def test_events_lie_inside_the_clip_and_those_of_one_kind_are_apart() -> None:
    for clip in CLIPS:
        for kind in ("ball", "lamp", "bar"):
            events = [e for e in clip.events if e.kind == kind]
            assert all(e.time_s > 0.1 and e.time_s + min(e.duration_s, 0.15) < 2.5 for e in events)
            assert all(b.time_s - a.time_s > 0.24 for a, b in pairwise(events))


def test_every_event_sounds_at_its_time_in_its_pitch() -> None:
    for clip in CLIPS[:30]:
        for event in clip.events:
            if event.kind == "bar":
                low, high = 4900.0, 7500.0
            else:
                pitch = {**BALL_PITCH_HZ, **LAMP_PITCH_HZ}[event.variant]
                low, high = pitch * 0.93, pitch * 1.07
            before = band_energy(clip, event.time_s - 0.05, event.time_s, low, high)
            after = band_energy(clip, event.time_s, event.time_s + 0.05, low, high)
            assert after > 10 * before


def test_a_kind_that_is_absent_makes_no_sound_in_its_band() -> None:
    bands = {"ball": (280.0, 1550.0), "lamp": (1700.0, 4200.0), "bar": (4900.0, 7500.0)}
    checked = 0
    for clip in CLIPS:
        present = {e.kind for e in clip.events}
        for kind in set(bands) - present:
            loudest = max(band_energy(clip, 0.0, 2.5, *bands[k]) for k in present)
            assert band_energy(clip, 0.0, 2.5, *bands[kind]) < 0.01 * loudest
            checked += 1
    assert checked > 10


def test_a_lamp_is_bright_while_it_beeps_and_at_no_other_time() -> None:
    right = frames_seen = 0
    for clip in CLIPS:
        # Nothing else in the world has this much blue.
        lamps = [e for e in clip.events if e.variant in ("white", "cyan")]
        blue = clip.frames[..., 2].max(axis=(1, 2)) > 231
        for i in range(40) if lamps else ():
            lit = max((min(i / 16 + 1 / 32, e.time_s + e.duration_s) - max(i / 16 - 1 / 32, e.time_s)) for e in lamps)
            if lit <= 0 or lit >= 0.99 / 16:
                right += blue[i] == (lit > 0)
                frames_seen += 1
    assert frames_seen > 500
    # A ball may pass in front of a lamp.
    assert right > 0.995 * frames_seen


def test_a_bar_moves_in_the_direction_that_its_event_names() -> None:
    checked = 0
    for clip in CLIPS:
        for event in (e for e in clip.events if e.kind == "bar"):
            first = int(np.ceil(event.time_s * 16)) + 1
            rows = clip.frames[first : first + 4, 22:36].astype(float)
            still = np.median(clip.frames[:, 22:36].astype(float), axis=0)
            change = np.abs(rows - still).sum(axis=(1, 3))
            x = (change**2 * np.arange(64)).sum(axis=1) / (change**2).sum(axis=1)
            checked += (x[-1] > x[0]) == (event.variant == "right")
    total = sum(e.kind == "bar" for clip in CLIPS for e in clip.events)
    # Where another object crosses the bar's rows the centre of change can move otherwise.
    assert checked > 0.93 * total


def test_no_clip_is_in_two_splits_and_a_clip_keeps_its_place_when_another_split_grows() -> None:
    small = plan_clips({"train": 10, "rpo": 5, "val": 3, "test": 2})
    large = plan_clips({"train": 100, "rpo": 5, "val": 3, "test": 2})
    assert len({p.clip_id for p in large}) == len({p.index for p in large}) == len(large) == 110
    assert [p for p in small if p.split != "train"] == [p for p in large if p.split != "train"]
    assert small[7].clip_id == "demo_000007"
    assert [p.clip_id for p in small] == sorted(p.clip_id for p in small)


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="dev"):
        plan_clips({"dev": 3})
    with pytest.raises(ValueError, match="'val'"):
        plan_clips({"val": -1})
    with pytest.raises(ValueError, match="'train'"):
        plan_clips({"train": 500_001})


def test_events_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CLIPS[0].events[0].time_s = 0.0  # type: ignore[misc]
