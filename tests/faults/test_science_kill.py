"""A study killed in an arm, then the same command: the numbers of an uninterrupted run, and its tables at any time."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import science
from tests.faults import launches
from tests.faults.launches import LIMIT_S, kill_when, write_preset

ARM = "seed_0/arms/rounds"


def write_study(home: Path) -> Path:
    content = {
        "preset": str(write_preset(home / "small.yaml")),
        "rounds": 1,
        "world": {"seed": 0, "num_train": 32, "num_rpo": 16, "num_val": 16, "num_test": 16},
        "seeds": [0],
        "m0": {"steps": 8},
        "rewards": {"plain": {}},
        "reward": "plain",
        "arms": {
            "rounds": {"job": "rpo_rounds", "flags": {"mode": "best_vs_worst", "with_control": True}},
            "longer": {"job": "train_mmdit", "flags": {"steps": 4}},
        },
        "compared_with": ["m0", "rounds_control"],
        "claims": [["rounds", "longer"]],
    }
    path = home / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def start(home: Path, name: str) -> subprocess.Popen[bytes]:
    flags = ["--study", str(home / "study.yaml"), "--out", str(home / name)]
    return launches.start("science", *flags, log=home / f"{name}.log")


def results(home: Path, name: str) -> dict[str, Any]:
    found = json.loads((home / name / "results" / "results.json").read_text())
    return {key: value for key, value in found.items() if key != "worker_seconds"}


@pytest.mark.slow
@pytest.mark.ray
def test_a_study_killed_in_an_arm_goes_on_to_the_numbers_of_one_that_was_not(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    # Beside the killed one, since starting a cluster leaves most of a machine idle.
    undisturbed = start(tmp_path, "whole")
    out, log = tmp_path / "cut", tmp_path / "cut.log"
    kill_when(start(tmp_path, "cut"), log, lambda: any((out / ARM / "round_0/pairs/data").glob("part-*")))
    assert (out / ARM / "baseline/codec/manifest.json").exists()
    assert not (out / ARM / "manifest.json").exists()

    partly = tmp_path / "partly"
    table = science.Options(out=str(out), study=str(study), table_only=True, results=str(partly))
    assert science.main(table) == 0
    assert (partly / "tables.md").read_text().startswith("8 of 13 stages are done.")

    assert start(tmp_path, "cut").wait(LIMIT_S) == 0, log.read_text()[-3000:]
    assert undisturbed.wait(LIMIT_S) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    found = results(tmp_path, "cut")
    assert found == results(tmp_path, "whole")
    assert found["done"] == "13 of 13 stages are done."
    assert list(found["values"]) == ["m0", "rounds", "rounds_control", "longer", "codec"]
    codec = {name: value and value["mean"]["value"] for name, value in found["values"]["codec"].items()}
    assert codec["f1"] == pytest.approx(1.0, abs=0.05)
    assert codec["frechet_codec"] == pytest.approx(0.0, abs=1e-6)
    assert codec["frechet"] > 0.1
    assert codec["diversity"] is codec["fm_loss"] is None
    assert "| rounds minus longer |" in (out / "results/tables.md").read_text()
