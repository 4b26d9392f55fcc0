"""What is evaluated and in which pieces: fixed plans, and a shuffle that leaves no clip its own conditions."""

from collections import Counter
from pathlib import Path

import pytest

from pipelines.data.contracts import FEATURES
from pipelines.data.store import Dataset
from pipelines.errors import InputError
from pipelines.evaluation.subjects import EvaluationSettings, Subject, derangement, plan_units
from pipelines.preferences.candidates import Sampling
from tests.feature_factory import write_features


def settings(
    subject: Subject = "policy", *, seed: int = 0, candidates: int = 1, max_clips: int | None = None
) -> EvaluationSettings:
    return EvaluationSettings(
        subject=subject,
        split="test",
        seed=seed,
        num_candidates=candidates,
        sampling=Sampling(num_steps=2, guidance=1.0),
        max_clips=max_clips,
    )


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = write_features(tmp_path_factory.mktemp("features"), {"test": 70, "val": 1, "train": 3})
    return Dataset.open(str(folder), FEATURES)


def test_every_clip_of_the_split_is_in_exactly_one_unit(features: Dataset) -> None:
    units = plan_units(features, settings())
    planned = [row["clip_id"] for unit in units for row in unit.rows]
    assert sorted(planned) == features.read(["clip_id"], split="test")["clip_id"].to_pylist()
    assert max(len(unit.rows) for unit in units) <= 16
    assert len({unit.unit_id for unit in units}) == len(units)


@pytest.mark.parametrize("count", [2, 3, 17])
def test_a_derangement_moves_everyone_and_loses_no_one(count: int) -> None:
    members = [str(i) for i in range(count)]
    for seed in range(20):
        permuted = derangement(members, seed)
        assert sorted(permuted) == sorted(members)
        assert all(a != b for a, b in zip(permuted, members, strict=True))


def test_shuffled_conditions_come_from_another_clip_and_each_clip_gives_once(features: Dataset) -> None:
    rows = [row for unit in plan_units(features, settings("shuffled")) for row in unit.rows]
    assert all(row["donor_clip_id"] != row["clip_id"] for row in rows)
    assert max(Counter(row["donor_clip_id"] for row in rows).values()) == 1
    again = [row for unit in plan_units(features, settings("shuffled")) for row in unit.rows]
    assert rows == again
    other = [row for unit in plan_units(features, settings("shuffled", seed=1)) for row in unit.rows]
    assert rows != other


def test_a_clip_alone_in_its_row_group_borrows_from_a_neighbour(tmp_path: Path) -> None:
    dataset = Dataset.open(str(write_features(tmp_path / "features", {"test": 65})), FEATURES)
    rows = {row["clip_id"]: row for unit in plan_units(dataset, settings("shuffled")) for row in unit.rows}
    assert dataset.parts[0].row_groups == (64, 1)
    assert rows["test_00064"]["donor_clip_id"] == "test_00000"
    assert rows["test_00064"]["donor_row_group"] == 0


def test_a_single_clip_has_no_other_conditions(tmp_path: Path) -> None:
    dataset = Dataset.open(str(write_features(tmp_path / "features", {"test": 1})), FEATURES)
    with pytest.raises(InputError, match="one clip"):
        plan_units(dataset, settings("shuffled"))


def test_a_sample_of_clips_is_seeded_and_nested(features: Dataset) -> None:
    def chosen(count: int, seed: int = 0) -> set[str]:
        units = plan_units(features, settings(seed=seed, max_clips=count))
        return {row["clip_id"] for unit in units for row in unit.rows}

    assert len(chosen(10)) == 10
    assert chosen(10) < chosen(20)
    assert chosen(10) != chosen(10, seed=1)


def test_a_split_without_clips_is_named_with_those_there_are(tmp_path: Path) -> None:
    dataset = Dataset.open(str(write_features(tmp_path / "features", {"train": 2})), FEATURES)
    with pytest.raises(InputError, match=r"no clips of split 'test'.*train"):
        plan_units(dataset, settings())


def test_settings_that_do_not_touch_a_subject_do_not_touch_its_fingerprint() -> None:
    truth = settings("ground_truth")
    assert truth.affecting_bytes() == settings("ground_truth", seed=5).affecting_bytes()
    assert settings().affecting_bytes() != settings(seed=5).affecting_bytes()
    assert settings().affecting_bytes() != settings(candidates=2).affecting_bytes()


def test_several_candidates_of_the_real_sound_are_refused() -> None:
    with pytest.raises(InputError, match="one sound a clip"):
        settings("ground_truth", candidates=4)
