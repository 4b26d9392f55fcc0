import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipelines.evaluation.embedding_metrics import (
    COLUMNS,
    KINDS,
    cosine_mean,
    desync_s,
    imagebind_score,
    patch_frechet_distance,
)
from pipelines.evaluation.metrics import frechet_distance, inception_score, kl_divergence, kl_divergence_sigmoid


def square(mean: tuple[float, float], deviation: tuple[float, float]) -> np.ndarray:
    """Four points with exactly this mean, and a diagonal covariance (N - 1) of these standard deviations."""
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3) / 2
    return np.array(mean) + corners * np.array(deviation)


def column(name: str):
    return next(c for c in COLUMNS if c.name == name)


def test_the_columns_of_the_table_give_the_golden_values(fixtures: Path) -> None:
    inputs = load_file(fixtures / "world" / "metrics.safetensors")
    expected = json.loads((fixtures / "world" / "metrics.json").read_text())
    features, logits = (inputs["gt_feat"], inputs["pred_feat"]), (inputs["gt_logits"], inputs["pred_logits"])
    # The golden distance and divergences were made of float32 means and logits.
    for name in ("FD_PaSST", "FD_PANNs"):
        assert column(name).of_pair(*features) == pytest.approx(expected["fd"], rel=1e-7)
    for name in ("KL_PANNs", "KL_PaSST"):
        assert column(name).of_pair(*logits) == pytest.approx(expected["kl"]["kl_softmax"], rel=1e-7)
    assert kl_divergence_sigmoid(*logits) == pytest.approx(expected["kl"]["kl_sigmoid"], rel=1e-7)
    mean, std = expected["isc"]["inception_score_mean"], expected["isc"]["inception_score_std"]
    assert column("IS").of_generated(logits[1]) == pytest.approx(mean, rel=1e-12)
    assert inception_score(logits[1]) == pytest.approx((mean, std), rel=1e-12)


def test_the_frechet_distance_of_two_known_normals_is_exact() -> None:
    a, b = square((0, 0), (1, 2)), square((3, 4), (5, 2))
    # |shift|^2 + (1 - 5)^2 + (2 - 2)^2.
    assert frechet_distance(a, b) == pytest.approx(25 + 16, rel=1e-12)
    turned = a @ np.array([[0.0, 1.0], [-1.0, 0.0]])
    # The same ellipse across: tr(2 diag(1, 4)) - 2 tr(diag(2, 2)), each in both axes.
    assert frechet_distance(a, turned) == pytest.approx(2 * (1 + 4) - 2 * (2 + 2), rel=1e-12)


def test_the_frechet_distance_of_singular_covariances_is_exact() -> None:
    line, across = square((0, 0), (2, 0)), square((0, 1), (0, 3))
    # Lines at right angles share nothing, so the root of the product vanishes.
    assert frechet_distance(line, across) == pytest.approx(1 + 4 + 9, rel=1e-12)
    # Fewer clips than features, as of a small test set by a wide network.
    few = np.random.default_rng(0).normal(size=(20, 300))
    assert frechet_distance(few, few + 0.5) == pytest.approx(300 * 0.25, rel=1e-6)


def test_kl_goes_from_the_real_to_the_generated_distribution() -> None:
    real, made = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert kl_divergence(real, made) == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1), rel=1e-12)
    assert kl_divergence(made, real) == pytest.approx(0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5), rel=1e-12)
    # Sigmoids of 0 and of log 3 are 1/2 and 3/4.
    zero, three = np.array([[0.0, 0.0]]), np.full((1, 2), np.log(3))
    assert kl_divergence_sigmoid(zero, three) == pytest.approx(2 * 0.5 * np.log(0.5 / 0.75), rel=1e-12)


def test_kl_is_the_mean_over_clips_and_knows_pairs() -> None:
    real, made = np.log([[0.5, 0.5], [0.2, 0.8]]), np.log([[0.9, 0.1], [0.2, 0.8]])
    assert kl_divergence(real, made) == pytest.approx(kl_divergence(real[:1], made[:1]) / 2, rel=1e-12)
    assert kl_divergence(real, made[::-1]) > 2 * kl_divergence(real, made)


def test_the_inception_score_shuffles_with_its_seed_and_cuts_ten_parts() -> None:
    order = np.random.RandomState(2020).permutation(20)
    logits = np.zeros((20, 2))
    # After the shuffle each part of two has one clip surely of each label: exp(mean KL) is 2 in every part.
    logits[order, np.arange(20) % 2] = 60.0
    assert inception_score(logits) == pytest.approx((2.0, 0.0), abs=1e-12)
    # Or both of one label: 1 in every part, though the labels are balanced over all.
    logits[:] = 0
    logits[order, np.arange(20) // 2 % 2] = 60.0
    assert inception_score(logits) == pytest.approx((1.0, 0.0), abs=1e-12)


def test_the_cosine_is_a_mean_over_pairs_and_ignores_lengths() -> None:
    a = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    b = np.array([[6.0, 8.0], [0.0, 5.0], [0.0, -1.0]])
    assert cosine_mean(a, b) == pytest.approx((1 + 0 - 1) / 3, abs=1e-15)
    assert cosine_mean(a[:1], np.array([[1.0, 0.0]])) == pytest.approx(0.6, rel=1e-15)
    assert cosine_mean(a.astype(np.float16) * 100, b) == pytest.approx(cosine_mean(a, b), abs=1e-12)
    assert imagebind_score(a[:1], np.array([[1.0, 0.0]])) == pytest.approx(60.0, rel=1e-15)


def test_the_cosine_refuses_what_has_no_direction_or_no_partner() -> None:
    rows = np.eye(3)
    with pytest.raises(ValueError, match="1 rows are all zeros"):
        cosine_mean(rows, np.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 1.0]]))
    with pytest.raises(ValueError, match="equally many rows"):
        cosine_mean(rows, rows[:2])
    with pytest.raises(ValueError, match="equally many rows"):
        cosine_mean(rows[:0], rows[:0])


def test_desync_is_the_mean_size_of_the_likeliest_offsets_of_all_windows() -> None:
    at = {-2.0: 0, -0.2: 9, 0.0: 10, 2.0: 20}
    logits = np.zeros((2, 42))
    for clip, offsets in enumerate([(-2.0, 0.0), (2.0, -0.2)]):
        for window, offset in enumerate(offsets):
            logits[clip, 21 * window + at[offset]] = 1.0
    assert desync_s(logits) == pytest.approx((2 + 0 + 2 + 0.2) / 4, rel=1e-12)
    assert desync_s(logits[:1, 21:]) == 0.0
    with pytest.raises(ValueError, match="multiple of 21"):
        desync_s(logits[:, :40])


def test_vggish_patches_count_one_by_one() -> None:
    rng = np.random.default_rng(3)
    real, made = rng.normal(size=(5, 3 * 128)), rng.normal(size=(5, 3 * 128))
    patches = [np.concatenate([row[i : i + 128] for row in rows for i in (0, 128, 256)]) for rows in (real, made)]
    expected = frechet_distance(*(p.reshape(15, 128) for p in patches))
    assert patch_frechet_distance(real, made) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="multiple of 128"):
        patch_frechet_distance(real[:, :200], made[:, :200])


def test_every_column_reads_a_known_kind_in_one_way_and_every_kind_has_a_column() -> None:
    assert {c.kind for c in COLUMNS} == set(KINDS)
    assert all((c.of_pair is None) != (c.of_generated is None) for c in COLUMNS)
    names = ["FD_PaSST", "FD_PANNs", "FD_VGG", "KL_PANNs", "KL_PaSST", "IS", "IB-score", "DeSync"]
    assert [c.name for c in COLUMNS] == names
