"""The same command started twice: one job writes the dataset, the other says who does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.data.contracts import FEATURES
from pipelines.data.store import Dataset
from tests.faults.test_preprocess_kill import ROOT, flags, make_clips, run_here


def started(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "preprocess.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(pid: int) -> list[int]:
    """Processes that any thread of a process started."""
    listed = (path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(child) for found in listed for child in found]


@pytest.mark.slow
def test_fault_33_the_second_of_two_jobs_stops_with_the_first_ones_name_and_nothing_is_mixed(tmp_path: Path) -> None:
    manifest, out = make_clips(tmp_path, 4), tmp_path / "out"
    command = [*flags(manifest, out, 0), "--decode-timeout-s", "600", "--stall-timeout-s", "1800"]
    first = started(command)
    while not list(out.glob("data/part-*")):
        assert first.poll() is None
        time.sleep(0.002)
    # With its decoder stopped the first is at work for as long as the second needs to meet it, and renews its lease.
    held_up = children(first.pid)
    for child in held_up:
        os.kill(child, signal.SIGSTOP)
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("data/*")}
    second = started(command)
    said = second.communicate()[0]
    assert second.returncode == 2, said
    for part in (f"{out} is being written by", f"process {first.pid}, ", os.uname().nodename, "preprocess.py"):
        assert part in said
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("data/*")} == done
    for child in held_up:
        os.kill(child, signal.SIGCONT)
    first.communicate()
    assert first.returncode == 0
    assert Dataset.open(str(out), FEATURES).digest == run_here(manifest, tmp_path / "whole").digest
