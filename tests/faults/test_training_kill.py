"""SIGKILL of a training's driver, then the same command: the journal and the weights of an uninterrupted run.

Real processes, real signals, the real jobs. The death of a worker is in tests/pipelines/test_workers.py, where a warm
group is at hand; a driver of two Ray workers dies in test_submitted_training.py, with its whole cluster.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.training.journal import read_journal
from tests.feature_factory import write_features, write_pairs
from tests.world_factory import write_degraded, write_policy, write_world

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0


def _command(job: str, out: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *flags, "--out", str(out)]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _kill_at_step(command: list[str], out: Path, step: int, home: Path) -> None:
    """Start the job and SIGKILL it once its journal has `step` steps, well before its end."""
    log = home / "killed.log"
    with log.open("w") as sink:
        process = subprocess.Popen(command, env=_environment(), stdout=sink, stderr=sink)
        started = time.monotonic()
        while len(read_journal(out / "metrics.jsonl")) < step:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - started < LIMIT_S, log.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "manifest.json").exists()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _losses(out: Path) -> list[tuple[object, object]]:
    return [(record["step"], record["loss"]) for record in read_journal(out / "metrics.jsonl")]


def _killed_equals_whole(job: str, flags: list[str], weights: str, tmp_path: Path, kill_at: int) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    # Beside the killed one, since starting a job leaves most of a machine idle.
    with ThreadPoolExecutor(1) as beside:
        undisturbed = beside.submit(_run, _command(job, whole, *flags))
        _kill_at_step(_command(job, killed, *flags), killed, kill_at, tmp_path)
        told = _run(_command(job, killed, *flags))
        undisturbed.result()
    assert f"{job}: resume" in told
    assert _losses(killed) == _losses(whole)
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    first, second = (json.loads((out / "manifest.json").read_text()) for out in (killed, whole))
    assert first["fingerprint"] == second["fingerprint"]
    assert first["metrics"] == second["metrics"]


def _steps(steps: int, checkpoint_every: int) -> list[str]:
    return [
        *("--steps", str(steps), "--batch-size", "8", "--lr", "1e-3", "--checkpoint-every", str(checkpoint_every)),
        *("--warmup-steps", "2", "--schedule", "cosine"),
    ]


def test_train_mmdit_killed_in_the_middle_ends_like_an_uninterrupted_run(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", {"train": 40, "val": 8})
    flags = ["--size", "tiny", "--features", str(features), "--num-workers", "0", "--ema-width", "None"]
    flags += ["--ema-decay", "0.9", *_steps(12, 4)]
    _killed_equals_whole("train_mmdit", flags, "network.safetensors", tmp_path, kill_at=6)


@pytest.mark.slow
def test_train_rpo_killed_in_the_middle_ends_like_an_uninterrupted_run(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", {"train": 40})
    policy, pairs = write_policy(tmp_path / "policy", features), write_pairs(tmp_path / "pairs", 40, 4)
    flags = ["--policy", str(policy), "--pairs", str(pairs), "--kappa", "5", "--divide-by-kappa"]
    flags += ["--num-workers", "0", *_steps(10, 3)]
    _killed_equals_whole("train_rpo", flags, "network.safetensors", tmp_path, kill_at=5)


@pytest.mark.slow
@pytest.mark.parametrize("with_degraded", [False, True])
def test_train_sf_cavp_killed_in_the_middle_ends_like_an_uninterrupted_run(tmp_path: Path, with_degraded: bool) -> None:
    features = write_world(tmp_path / "features", {"train": 40, "val": 8})
    flags = ["--size", "tiny", "--features", str(features), "--num-workers", "0", *_steps(8, 3)]
    if with_degraded:
        policy = write_policy(tmp_path / "policy", features)
        degraded = write_degraded(tmp_path / "degraded", features, policy, max_clips=8)
        flags += ["--degraded", str(degraded), "--degraded-every", "2"]
    _killed_equals_whole("train_sf_cavp", flags, "sf_cavp.safetensors", tmp_path, kill_at=4)
