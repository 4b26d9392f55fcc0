"""The driver of preprocess is told to go, in every way there is; the same command continues to the same dataset."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from pipelines.data.store import MANIFEST
from tests.faults.test_preprocess_kill import ROOT, flags, make_clips, run_here


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """The command with Ctrl-C as a terminal gives it: a shell's background jobs, such as a CI's, start deaf to it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "preprocess.py"), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_parts(driver: subprocess.Popen[bytes], out: Path, parts: int) -> None:
    """Until so many units are committed."""
    deadline = time.monotonic() + 120
    while len(list(out.glob("data/part-*"))) < parts:
        assert driver.poll() is None, "the driver ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_fault_23_a_driver_that_is_terminated_or_interrupted_twice_continues(tmp_path: Path) -> None:
    manifest, out = make_clips(tmp_path, 6), tmp_path / "out"
    arguments = flags(manifest, out, 0)
    terminated = start(arguments)
    wait_for_parts(terminated, out, 1)
    terminated.send_signal(signal.SIGTERM)
    assert terminated.wait(timeout=60) != 0
    interrupted = start(arguments)
    wait_for_parts(interrupted, out, len(list(out.glob("data/part-*"))) + 1)
    interrupted.send_signal(signal.SIGINT)
    time.sleep(0.05)
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(timeout=60) in (130, -signal.SIGINT)
    assert not (out / MANIFEST).exists()
    assert 2 <= len(list(out.glob("data/part-*"))) < 4
    resumed = run_here(manifest, out)
    assert resumed.digest == run_here(manifest, tmp_path / "whole").digest
    assert resumed.manifest["counts"] == {"in": 28, "out": 24, "rejected": 4, "repeated": 0}
