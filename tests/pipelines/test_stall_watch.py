"""The watcher kills a process that stops giving signs of life, and no other."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 1.0
PRELUDE = f"from pipelines.data.stall_watch import StallWatch; import time; w = StallWatch({LIMIT_S}); "


def run(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


@pytest.mark.parametrize(
    ("code", "ends_with"),
    [
        ("w.beat(); time.sleep(60)", -signal.SIGKILL),
        ("w.beat(); w.rest(); time.sleep(3 * w_s)", 0),
        ("[(w.beat(), time.sleep(w_s / 4)) for _ in range(12)]", 0),
        ("w.beat(); w.close(); time.sleep(3 * w_s)", 0),
        ("time.sleep(3 * w_s)", 0),
        # The watcher itself may die: its worker goes on.
        ("w._watcher.kill(); w._watcher.wait(); w.beat(); w.rest()", 0),
    ],
    ids=["silent", "resting", "beating", "closed", "idle", "watcher killed"],
)
def test_only_a_worker_that_is_silent_in_its_work_is_killed(code: str, ends_with: int) -> None:
    assert run(f"w_s = {LIMIT_S}; {code}").wait(timeout=30) == ends_with


def test_a_stopped_process_is_killed_and_its_watcher_ends() -> None:
    code = "w.beat(); print(w._watcher.pid, flush=True); import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    worker = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert worker.stdout is not None
    watcher = int(worker.stdout.readline())
    assert worker.wait(timeout=30) == -signal.SIGKILL
    for _ in range(200):
        if not Path(f"/proc/{watcher}").exists() or "Z" in Path(f"/proc/{watcher}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    pytest.fail("the watcher outlives its worker")
