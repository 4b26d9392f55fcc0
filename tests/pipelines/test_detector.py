import numpy as np
import pytest
import torch

from models.codec import build_codec
from pipelines.data.demo_world import SAMPLE_RATE_HZ, Event, render_clip
from pipelines.errors import InputError
from pipelines.evaluation.detector import Detection, detect, match, total

CLIPS = [render_clip(11, index) for index in range(60)]


def event(time_s: float, kind: str = "ball", variant: str = "red") -> Event:
    return Event(time_s=time_s, duration_s=0.15, kind=kind, variant=variant)


def heard(time_s: float, kind: str = "ball", variant: str = "red") -> Detection:
    return Detection(time_s=time_s, kind=kind, variant=variant)


def test_the_real_sound_of_clips_is_heard_right() -> None:
    counts = total(match(detect(c.wave, SAMPLE_RATE_HZ), c.events) for c in CLIPS)
    assert counts.f1 >= 0.99
    assert counts.class_f1 >= 0.99
    assert counts.set_f1 >= 0.99


def test_onsets_are_found_within_twenty_milliseconds() -> None:
    for clip in CLIPS:
        found = detect(clip.wave, SAMPLE_RATE_HZ)
        counts = match(found, clip.events, tolerance_s=0.02)
        assert counts.num_matched >= counts.num_events - 1


def test_the_codec_loses_no_event() -> None:
    codec = build_codec("tiny")
    waves = torch.from_numpy(np.stack([c.wave for c in CLIPS]))
    inverted = codec.decode(codec.encode(waves)[0]).numpy()
    counts = total(match(detect(w, SAMPLE_RATE_HZ), c.events) for w, c in zip(inverted, CLIPS, strict=True))
    assert counts.f1 >= 0.97
    assert counts.class_f1 >= 0.97


def test_the_sound_of_another_clip_scores_near_chance() -> None:
    found = [detect(c.wave, SAMPLE_RATE_HZ) for c in CLIPS]
    counts = total(match(found[i - 7], c.events) for i, c in enumerate(CLIPS))
    assert 0.08 < counts.f1 < 0.25
    assert 0.0 < counts.class_f1 < 0.12


def test_a_sound_that_comes_200_ms_late_scores_near_chance() -> None:
    late = [np.roll(c.wave, round(0.2 * SAMPLE_RATE_HZ)) for c in CLIPS]
    counts = total(match(detect(w, SAMPLE_RATE_HZ), c.events) for w, c in zip(late, CLIPS, strict=True))
    assert counts.f1 < 0.25
    assert counts.set_f1 > 0.9


def test_silence_and_steady_noise_and_a_hum_hold_no_events() -> None:
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.standard_normal(40_000)
    hum = 0.3 * np.sin(2 * np.pi * 2400 * np.arange(40_000) / SAMPLE_RATE_HZ)
    assert detect(np.zeros(40_000, np.float32), SAMPLE_RATE_HZ) == []
    assert detect(noise, SAMPLE_RATE_HZ) == []
    assert all(d.time_s < 0.05 for d in detect(hum, SAMPLE_RATE_HZ))


def test_a_gain_of_6_db_changes_little() -> None:
    for gain in (0.5, 2.0):
        counts = total(match(detect(gain * c.wave, SAMPLE_RATE_HZ), c.events) for c in CLIPS[:30])
        assert counts.class_f1 > 0.98


def test_sound_of_another_rate_or_shape_is_refused() -> None:
    with pytest.raises(InputError, match="44100"):
        detect(np.zeros(100), 44_100)
    with pytest.raises(InputError, match=r"\(2, 100\)"):
        detect(np.zeros((2, 100)), SAMPLE_RATE_HZ)


def test_a_match_needs_the_kind_and_the_time_and_counts_once() -> None:
    events = [event(1.0), event(1.5), event(2.0, "lamp", "cyan")]
    counts = match([heard(1.04), heard(1.05), heard(1.61), heard(2.0)], events)
    assert (counts.num_events, counts.num_detected, counts.num_matched) == (3, 4, 1)
    assert counts.f1 == pytest.approx(2 / 7)


def test_one_detection_between_two_events_serves_the_one_that_leaves_the_other_served() -> None:
    counts = match([heard(1.05), heard(1.12)], [event(1.0), event(1.1)])
    assert counts.num_matched == 2


def test_the_wrong_pitch_counts_as_an_onset_but_not_as_a_class() -> None:
    counts = match([heard(1.0, variant="blue"), heard(1.5)], [event(1.0), event(1.5)])
    assert (counts.num_matched, counts.num_class_matched) == (2, 1)
    assert (counts.f1, counts.class_f1) == (1.0, 0.5)


def test_set_f1_asks_only_which_kinds_are_there() -> None:
    counts = match([heard(0.1), heard(0.2, "bar", "left")], [event(2.0), event(1.0, "lamp", "cyan")])
    assert (counts.num_matched, counts.set_f1) == (0, 0.5)


def test_totals_weigh_events_not_clips() -> None:
    counts = total([match([heard(1.0)], [event(1.0)]), match([], [event(0.5), event(1.0), event(1.5)])])
    assert counts.f1 == pytest.approx(2 / 5)
    assert total([]).f1 == 0.0
