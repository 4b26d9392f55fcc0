"""The rounds fold, killed for real: SIGKILL while pairs are made, then while a policy trains, then the same command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import cli
from jobs.rpo_rounds import Options, main
from pipelines.data.store import read_manifest
from tests.world_factory import write_policy, write_reward, write_world

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ("baseline/scores", "round_0/pairs", "round_0/policy", "round_0/scores", "round_0/verdict")
STEPS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    features = write_world(root / "features", {"rpo": 36, "val": 4})
    write_policy(root / "m0", features)
    write_reward(root / "reward", features)
    return root


def flags(world: Path, out: Path) -> list[str]:
    values = {
        "policy": world / "m0",
        "reward": world / "reward",
        "features": world / "features",
        "out": out,
        "rounds": 1,
        "num-candidates": 2,
        "num-steps": 2,
        "guidance": 1.0,
        "margin": 0.0,
        "eval-candidates": 2,
        "steps": STEPS,
        "batch-size": 4,
        "checkpoint-every": 4,
        "lr": 1e-3,
        "warmup-steps": 0,
        "kappa": 5.0,
        "gate": "report",
        "num-workers": 0,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def start(world: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "jobs/rpo_rounds.py", *flags(world, out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """SIGKILL the job's whole process group as soon as `reached`; it must not have ended by itself."""
    for _ in range(6000):
        if reached():
            break
        assert process.poll() is None, "the job ended before it could be killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def parts(folder: Path) -> int:
    return len(list((folder / "data").glob("part-*.parquet")))


@pytest.mark.slow
def test_rounds_killed_in_pairs_and_in_training_end_as_if_never_killed(world: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(cli.parse("rpo_rounds", Options, flags(world, whole))) == 0

    pairs, policy = cut / "round_0/pairs", cut / "round_0/policy"
    kill_when(start(world, cut), lambda: 1 <= parts(pairs) < 3)
    assert not (pairs / "manifest.json").exists()
    kill_when(start(world, cut), lambda: any(policy.glob("checkpoints/*/COMPLETE")))
    assert not (policy / "manifest.json").exists()
    assert start(world, cut).wait() == 0

    for name in ARTIFACTS:
        ours, theirs = read_manifest(str(cut / name)), read_manifest(str(whole / name))
        assert ours["fingerprint"] == theirs["fingerprint"], name
        for key in ("digest", "files", "outcomes", "verdict"):
            assert ours.get(key) == theirs.get(key), (name, key)
    assert read_manifest(str(cut))["final_policy"] == read_manifest(str(whole))["final_policy"]
