"""SIGKILL of jobs/degrade.py between two units, then the same command: the dataset of an uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import cli
from jobs.degrade import Options, main
from pipelines.data.store import read_manifest
from tests.world_factory import write_policy, write_world

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0


def parts(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (out / "data").glob("part-*.parquet")}


@pytest.mark.slow
def test_degrade_killed_in_the_middle_goes_on_to_the_digest_of_an_uninterrupted_run(tmp_path: Path) -> None:
    features = write_world(tmp_path / "features", {"train": 36})
    flags = [f"--policy={write_policy(tmp_path / 'policy', features)}", f"--features={features}"]
    flags += ["--num-workers=0", "--num-steps=2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(cli.parse("degrade", Options, [*flags, f"--out={whole}"])) == 0

    command = [sys.executable, "jobs/degrade.py", *flags, f"--out={cut}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    started = time.monotonic()
    while not parts(cut):
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() - started < LIMIT_S
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = parts(cut)
    assert 1 <= len(before) < 3
    assert not (cut / "manifest.json").exists()
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT_S, check=False).returncode == 0

    ours, theirs = read_manifest(str(cut)), read_manifest(str(whole))
    for key in ("fingerprint", "digest", "counts", "num_versions"):
        assert ours[key] == theirs[key], key
    assert before.items() <= parts(cut).items()
