"""A launch of many stages at the smallest size, in a process that can be killed at a chosen moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipelines.tracking import LAUNCH_VARIABLE

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


def write_preset(path: Path) -> Path:
    """Preset tiny with still fewer steps and clips."""
    sections = yaml.safe_load((ROOT / "jobs" / "presets" / "tiny.yaml").read_text())
    path.write_text(yaml.safe_dump({job: flags | SMALLER.get(job, {}) for job, flags in sections.items()}))
    return path


def start(job: str, *flags: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a job in a session of its own, with a launch of its own; what it prints is appended to `log`."""
    environment = {k: v for k, v in os.environ.items() if k not in (LAUNCH_VARIABLE, "MLFLOW_TRACKING_URI")}
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *flags],
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,
        )


def kill_when(process: subprocess.Popen[bytes], log: Path, reached: Callable[[], bool]) -> None:
    """SIGKILL the driver once `reached`; fails where the job ends before."""
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
