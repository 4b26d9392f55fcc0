"""The whole line killed in its middle, twice, then the same command: the artifacts and numbers of an uninterrupted run.

And what MLflow has to show of it: one parent run, a child a stage.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.data.store import read_manifest
from pipelines.tracking import LAUNCH_VARIABLE
from pipelines.tracking_ship import Store
from pipelines.training.journal import read_journal

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600.0
SMALLER: dict[str, dict[str, Any]] = {
    "train_sf_cavp": {"steps": 6, "batch_size": 8, "warmup_steps": 2, "validate_every": 0, "checkpoint_every": 2},
    "train_mmdit": {"steps": 12, "batch_size": 8, "warmup_steps": 2, "validate_every": 0, "checkpoint_every": 4},
    # An untrained reward may prefer either sound: nearly every pair is kept, whatever it says.
    "rpo_rounds": {"max_clips": 24, "eval_clips": 8, "margin": 0.0, "steps": 6, "batch_size": 4, "warmup_steps": 2},
    "evaluate": {"num_steps": 2},
    "report": {"num_clips": 2},
}
STAGES = (
    *("world", "features", "m0", "degraded", "sf_cavp", "rpo"),
    *("rpo/round_0/pairs", "rpo/round_0/policy", "rpo/round_0/control", "rpo/round_0/scores", "rpo/round_0/verdict"),
    *("scores/m0", "scores/m1", "scores/control1", "gates", "report"),
)


def write_preset(path: Path) -> Path:
    sections = yaml.safe_load((ROOT / "jobs" / "presets" / "tiny.yaml").read_text())
    path.write_text(yaml.safe_dump({job: flags | SMALLER.get(job, {}) for job, flags in sections.items()}))
    return path


def start(home: Path, name: str) -> subprocess.Popen[bytes]:
    counts = ["--num-train=64", "--num-rpo=32", "--num-val=32", "--num-test=32", "--rounds=1"]
    flags = [f"--preset={home / 'small.yaml'}", *counts, "--out", str(home / name / "demo")]
    environment = {k: v for k, v in os.environ.items() if k not in (LAUNCH_VARIABLE, "MLFLOW_TRACKING_URI")}
    with (home / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "demo.py"), *flags],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def kill_when(process: subprocess.Popen[bytes], log: Path, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


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
