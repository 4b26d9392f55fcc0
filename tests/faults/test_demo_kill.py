"""The whole line killed in its middle, twice, then the same command: the artifacts and numbers of an uninterrupted run.

And what MLflow has to show of it: one parent run, a child a stage.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.store import read_manifest
from pipelines.tracking_ship import Store
from pipelines.training.journal import read_journal
from tests.faults import launches
from tests.faults.launches import LIMIT_S, kill_when, write_preset

STAGES = (
    *("world", "features", "m0", "degraded", "sf_cavp", "rpo", "rpo/baseline/codec"),
    *("rpo/round_0/pairs", "rpo/round_0/policy", "rpo/round_0/control", "rpo/round_0/scores", "rpo/round_0/verdict"),
    *("scores/m0", "scores/m1", "scores/control1", "gates", "report"),
)


def start(home: Path, name: str) -> subprocess.Popen[bytes]:
    counts = ["--num-train=64", "--num-rpo=32", "--num-val=32", "--num-test=32", "--rounds=1"]
    flags = [f"--preset={home / 'small.yaml'}", *counts, "--out", str(home / name / "demo")]
    return launches.start("demo", *flags, log=home / f"{name}.log")


def finish(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    # 4: the gate of a policy trained for a dozen steps may say either; the numbers are there all the same.
    assert process.wait(LIMIT_S) in (0, 4), log.read_text()[-3000:]
    found = json.loads((log.parent / log.stem / "demo" / "summary.json").read_text())
    return {name: value for name, value in found.items() if not name.startswith("seconds_")}


def digests(out: Path) -> dict[str, Any]:
    found = {name: read_manifest(str(out / name)) for name in STAGES}
    names = ("fingerprint", "digest", "files", "verdict", "outcomes", "metrics")
    return {name: {key: manifest.get(key) for key in names} for name, manifest in found.items()}


@pytest.mark.slow
@pytest.mark.ray
def test_the_demo_killed_in_training_and_in_its_evaluations_ends_as_if_never_killed(tmp_path: Path) -> None:
    write_preset(tmp_path / "small.yaml")
    # Beside the killed ones, since starting a cluster leaves most of a machine idle.
    undisturbed = start(tmp_path, "whole")

    out, log = tmp_path / "cut" / "demo", tmp_path / "cut.log"
    kill_when(start(tmp_path, "cut"), log, lambda: len(read_journal(out / "m0" / "metrics.jsonl")) >= 6)
    assert not (out / "m0" / "manifest.json").exists()
    kill_when(start(tmp_path, "cut"), log, lambda: any((out / "scores" / "m0" / "data").glob("part-*")))
    assert not (out / "scores" / "m0" / "manifest.json").exists()
    assert finish(start(tmp_path, "cut"), log) == finish(undisturbed, tmp_path / "whole.log")
    assert digests(out) == digests(tmp_path / "whole" / "demo")

    store = Store(f"sqlite:///{tmp_path / 'cut' / 'mlflow.db'}")
    runs = store.client.search_runs([store.experiment_id()], max_results=100)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["demo"]
    children = {run.info.run_name for run in runs} - {"demo"}
    stages = {"make_demo_world", "preprocess", "train_mmdit", "degrade", "train_sf_cavp", "rpo_rounds"}
    assert children == stages | {"generate_preferences", "train_rpo", "evaluate", "check_reward", "report"}
