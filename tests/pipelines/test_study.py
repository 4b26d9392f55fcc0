"""A study's YAML: what it runs, and one clear line for what it cannot be."""

from pathlib import Path

import pytest
import yaml

from pipelines.errors import InputError
from pipelines.evaluation.study import read_study
from pipelines.evaluation.study_folders import Replicate, policies

MINIMAL = {
    "preset": "tiny",
    "rounds": 2,
    "world": {"seed": 0},
    "seeds": [3, 5],
    "m0": {},
    "rewards": {"plain": {}, "long": {"steps": 9}},
    "reward": "long",
    "arms": {
        "rpo": {"job": "rpo_rounds", "flags": {"with_control": True}},
        "sweep": {"job": "rpo_rounds", "flags": {"kappa": 2.0, "rounds": 1}, "seeds": [5]},
        "longer": {"job": "train_mmdit", "flags": {"steps": 9}},
    },
    "compared_with": ["m0", "rpo_control"],
}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes, sort_keys=False))
    return path


def test_an_arm_with_a_control_is_two_subjects_of_its_own_replicates(tmp_path: Path) -> None:
    study = read_study(written(tmp_path))
    assert study.subjects == ("m0", "rpo", "rpo_control", "sweep", "longer", "codec")
    assert study.seeds_of("rpo_control") == study.seeds_of("m0") == (3, 5)
    assert study.seeds_of("sweep") == (5,)


def test_rounds_learn_from_the_world_and_training_from_m0s_own_clips_unless_an_arm_says(tmp_path: Path) -> None:
    arms = {
        "rpo": {"job": "rpo_rounds"},
        "own_rpo": {"job": "rpo_rounds", "clips": "m0"},
        "longer": {"job": "train_mmdit"},
        "more": {"job": "train_mmdit", "clips": "world"},
    }
    apart = read_study(written(tmp_path, arms=arms, compared_with=[], m0_world={"num_train": 9}))
    assert {arm.name for arm in apart.arms if apart.learns_from_world(arm)} == {"rpo", "more"}
    shared = read_study(written(tmp_path, arms=arms, compared_with=[]))
    assert all(shared.learns_from_world(arm) for arm in shared.arms)


def test_a_subject_is_the_policy_that_its_last_round_left(tmp_path: Path) -> None:
    study = read_study(written(tmp_path))
    rpo, sweep, longer = study.arms
    place = Replicate("/out", 5).arm("rpo")
    assert policies(study, rpo, place) == {
        "rpo": "/out/seed_5/arms/rpo/round_1/policy",
        "rpo_control": "/out/seed_5/arms/rpo/round_1/control",
    }
    assert policies(study, sweep, "/out/x") == {"sweep": "/out/x/round_0/policy"}
    assert policies(study, longer, "/out/y") == {"longer": "/out/y"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reward": "other"}, "'other'"),
        ({"compared_with": ["nobody"]}, "'nobody'"),
        ({"claims": [["rpo", "somebody"]]}, "'somebody'"),
        ({"arms": {"a": {"job": "preprocess"}}, "compared_with": []}, "'preprocess'"),
        ({"arms": {"a": {"job": "rpo_rounds", "seeds": [4]}}, "compared_with": []}, "seeds"),
        ({"arms": {"a": {"job": "rpo_rounds", "clips": "moon"}}, "compared_with": []}, "'moon'"),
        ({"arms": {"m0": {"job": "rpo_rounds"}}, "compared_with": []}, "one name"),
        ({"arms": {"codec": {"job": "rpo_rounds"}}, "compared_with": []}, "one name"),
        ({"seeds": []}, "no seed"),
        ({"arms": None}, "not a study"),
    ],
)
def test_what_a_study_cannot_be_is_one_line_with_the_file(tmp_path: Path, changes: dict, says: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(InputError, match=says) as found:
        read_study(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


def test_a_study_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        read_study(tmp_path / "nowhere.yaml")
