"""The study's launch: every command parses before anything runs, and a table can be had at any time."""

from pathlib import Path

import pytest
import yaml

from jobs import science
from jobs.chain import parse_all
from pipelines.errors import InputError
from pipelines.evaluation.study import read_study

STUDIES = sorted(science.STUDIES.glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_in_the_repository_is_a_line_of_commands_that_parse(path: Path) -> None:
    study = read_study(path)
    todo = science.steps(study, "/out", 2)
    parse_all(todo, study.preset)
    assert len({step.done for step in todo}) == len(todo)
    tested = [step for step in todo if "/test/" in step.done]
    assert len(tested) == sum(len(study.seeds_of(subject)) for subject in study.subjects)
    # No decision may read the test split: what is trained or gated never names it.
    assert not [step for step in todo if step.job != "evaluate" and "test" in " ".join(step.flags).split("=")]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_input_of_a_step_is_the_output_of_an_earlier_one(path: Path) -> None:
    todo = science.steps(read_study(path), "/out", 2)
    made = {"/out/world/clips.csv", "/out/m0_world/clips.csv"}
    for step in todo:
        places = [flag for flag in step.flags if flag.startswith("/out/")][:-1]
        # A round's policy lies in the folder of its arm.
        assert all(any(place == one or place.startswith(f"{one}/round_") for one in made) for place in places), step
        made.add(step.done)


def test_plain_flow_matching_goes_on_with_m0s_own_clips_or_with_all_and_partial_arms_come_last(tmp_path: Path) -> None:
    content = yaml.safe_load((science.STUDIES / "rpo_demo_world.yaml").read_text())
    content |= {"m0_world": {"num_train": 9}, "seeds": [0, 1], "compared_with": ["m0"], "claims": []}
    content["rewards"] = {"edits": {}, "ranking": {"degraded_every": 4}}
    content["arms"] = {
        "probe": {"job": "rpo_rounds", "flags": {"kappa": 1.0}, "seeds": [1]},
        "longer": {"job": "train_mmdit", "flags": {"steps": 9}},
        "more_clips": {"job": "train_mmdit", "flags": {"steps": 9}, "clips": "world"},
        "own_rounds": {"job": "rpo_rounds", "flags": {"split": "train"}, "clips": "m0"},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    todo = science.steps(read_study(path), "/out", 2)
    flags = {step.name: " ".join(step.flags) for step in todo}
    assert "--num-train=9" in flags["m0_world"]
    for name in ("seed_0/m0", "seed_1/arms/longer", "seed_0/arms/own_rounds"):
        assert "--features /out/m0_features" in flags[name], name
    for name in ("seed_1/arms/more_clips", "seed_0/rewards/edits", "seed_0/degraded", "seed_1/arms/probe"):
        assert "--features /out/features" in flags[name], name
    assert "--degraded /out/seed_1/degraded" in flags["seed_1/rewards/ranking"]
    assert "--degraded" not in flags["seed_1/rewards/edits"]
    assert [step.name for step in todo][-2:] == ["seed_1/arms/probe", "seed_1/test/probe"]


def test_a_wrong_flag_of_an_arm_is_told_before_anything_runs(tmp_path: Path) -> None:
    content = yaml.safe_load((science.STUDIES / "rpo_demo_world.yaml").read_text())
    content["arms"]["gt_vs_worst"]["flags"]["kapa"] = 3
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="kapa"):
        science.main(science.Options(out=str(tmp_path / "out"), study=str(path)))
    assert not (tmp_path / "out").exists()


def test_the_table_of_a_study_that_has_not_begun_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert science.main(science.Options(out=str(tmp_path / "out"), table_only=True)) == 0
    assert "0 of" in capsys.readouterr().out
