import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipelines.data.demo_world import render_clip
from pipelines.evaluation.metrics import (
    INCEPTION_SPLITS,
    MEL_FLOOR_DB,
    MelMeasure,
    audio_statistics,
    diversity,
    frechet_distance,
    inception_score,
    kl_divergence,
    kl_divergence_sigmoid,
    log_mel_distance,
)


@pytest.fixture(scope="module")
def waves() -> np.ndarray:
    return np.stack([render_clip(5, index).wave for index in range(24)])


def test_formulas_equal_the_golden_values(fixtures: Path) -> None:
    inputs = load_file(fixtures / "world" / "metrics.safetensors")
    expected = json.loads((fixtures / "world" / "metrics.json").read_text())
    truth, subject = inputs["gt_logits"], inputs["pred_logits"]
    assert frechet_distance(inputs["pred_feat"], inputs["gt_feat"]) == pytest.approx(expected["fd"], rel=1e-6)
    assert kl_divergence(truth, subject) == pytest.approx(expected["kl"]["kl_softmax"], rel=1e-6)
    assert kl_divergence_sigmoid(truth, subject) == pytest.approx(expected["kl"]["kl_sigmoid"], rel=1e-6)
    mean, std = inception_score(subject)
    assert mean == pytest.approx(expected["isc"]["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(expected["isc"]["inception_score_std"], rel=1e-9)


def test_the_frechet_distance_of_normal_samples_is_the_known_one() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0.0, 1.0, (20_000, 3))
    b = rng.normal([1.0, 0.0, 0.0], [1.0, 2.0, 1.0], (20_000, 3))
    # |shift|^2 + the sum of squared differences of the standard deviations.
    assert frechet_distance(a, b) == pytest.approx(1.0 + 1.0, abs=0.1)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_the_frechet_distance_stands_singular_covariances() -> None:
    rng = np.random.default_rng(1)
    few, flat = rng.normal(size=(4, 10)), np.zeros((6, 10))
    assert np.isfinite(frechet_distance(few, few + 1))
    assert frechet_distance(few, few + 1) == pytest.approx(10.0)
    assert frechet_distance(flat, flat) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="2 rows"):
        frechet_distance(few[:1], few)
    with pytest.raises(ValueError, match="one width"):
        frechet_distance(few, flat[:, :5])


def test_kl_of_equal_logits_is_zero_and_ignores_a_common_offset() -> None:
    logits = np.random.default_rng(2).normal(size=(12, 5))
    assert kl_divergence(logits, logits + 3.0) == pytest.approx(0.0, abs=1e-12)
    assert kl_divergence_sigmoid(logits, logits) == 0.0
    assert np.isfinite(kl_divergence(logits * 1000, -logits * 1000))


def test_the_inception_score_goes_from_one_to_the_number_of_labels() -> None:
    sure = np.tile(np.eye(4) * 50, (50, 1))
    assert inception_score(np.zeros((40, 4)))[0] == pytest.approx(1.0)
    assert inception_score(sure)[0] == pytest.approx(4.0, rel=0.1)
    with pytest.raises(ValueError, match="at least 10"):
        inception_score(sure[:9])


def test_pictures_are_in_decibels_below_full_scale(waves: np.ndarray) -> None:
    measure = MelMeasure("tiny")
    silence = measure.picture(np.zeros(40_000, np.float32))
    assert silence.shape == (40, 160)
    assert (silence == MEL_FLOOR_DB).all()
    assert measure.picture(waves).shape == (24, 40, 160)
    assert measure.picture(waves)[3] == pytest.approx(measure.picture(waves[3]), abs=1e-4)
    tone = np.sin(2 * np.pi * 1000 * np.arange(40_000) / 16_000)
    assert measure.picture(tone).max() == pytest.approx(0.0, abs=0.1)
    # A tenth of the amplitude is 20 dB less.
    assert measure.picture(0.1 * tone).max() == pytest.approx(-20.0, abs=0.1)


def test_every_codec_has_a_measure_of_the_same_scale() -> None:
    for name, rate_hz in (("16k", 16_000), ("44k", 44_100)):
        tone = np.sin(2 * np.pi * 1000 * np.arange(rate_hz) / rate_hz)
        assert MelMeasure(name).picture(0.1 * tone).max() == pytest.approx(-20.0, abs=0.5)


def test_distance_grows_with_what_differs(waves: np.ndarray) -> None:
    measure = MelMeasure("tiny")
    own, other = measure.picture(waves[0]), measure.picture(waves[1])
    quieter, late = measure.picture(0.8 * waves[0]), measure.picture(np.roll(waves[0], 3200))
    assert log_mel_distance(own, own) == 0.0
    assert 0 < log_mel_distance(own, quieter) < log_mel_distance(own, late)
    assert log_mel_distance(own, other) == log_mel_distance(other, own) > log_mel_distance(own, quieter)


def test_diversity_is_the_mean_over_pairs(waves: np.ndarray) -> None:
    pictures = MelMeasure("tiny").picture(waves[:3])
    pairs = [log_mel_distance(pictures[i], pictures[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert diversity(pictures) == pytest.approx(np.mean(pairs))
    assert diversity(np.stack([pictures[0]] * 4)) == 0.0
    assert np.isnan(diversity(pictures[:1]))


def test_statistics_know_what_sounds_and_not_when(waves: np.ndarray) -> None:
    measure = MelMeasure("tiny")
    own = audio_statistics(measure.picture(waves[0]))
    assert own.shape == (40,)
    assert own.dtype == np.float32
    statistics = [audio_statistics(measure.picture(w)) for w in waves]
    # The median clip: where a sound is cut by the roll, the cut itself is heard.
    moved = np.median(
        [
            np.abs(a - audio_statistics(measure.picture(np.roll(w, 3200)))).max()
            for a, w in zip(statistics, waves, strict=True)
        ]
    )
    assert moved < 0.1 * min(np.abs(own - other).max() for other in statistics[1:])


def test_the_frechet_distance_of_statistics_rises_when_a_kind_of_sound_is_missing(waves: np.ndarray) -> None:
    measure = MelMeasure("tiny")
    spectrum = np.fft.rfft(waves)
    spectrum[:, np.fft.rfftfreq(40_000, 1 / 16_000) > 4500] = 0
    real = np.stack([audio_statistics(p) for p in measure.picture(waves)])
    dull = np.stack([audio_statistics(p) for p in measure.picture(np.fft.irfft(spectrum))])
    halves = frechet_distance(real[:12], real[12:])
    assert frechet_distance(real, dull) > halves


def test_the_inception_score_of_clips_that_are_sure_of_different_labels_is_their_number() -> None:
    # Logits so far apart that a label's probability is 0 in float64 wherever it is not the clip's own.
    logits = np.tile(2000.0 * np.eye(4), (INCEPTION_SPLITS * 25, 1))
    mean, _ = inception_score(logits)
    assert 3.5 < mean <= 4.0
