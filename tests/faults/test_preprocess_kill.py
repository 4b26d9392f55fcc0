"""kill -9 in the middle of preprocessing, then the same command: the dataset of an uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.preprocess import Options, main
from pipelines.data.contracts import FEATURES
from pipelines.data.store import Dataset
from tests.pipelines.clip_factory import simple_clip

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("test", "train", "val", "rpo")


def make_clips(folder: Path, per_split: int) -> Path:
    """Four units, one a split; one clip of each is bad."""
    lines = ["video,split"]
    for split in SPLITS:
        for i in range(per_split):
            simple_clip(folder / f"{split}{i}.mp4", 2.5 + 0.25 * (i % 2), frame_rate=25)
            lines.append(f"{split}{i}.mp4,{split}")
        (folder / f"{split}bad.mp4").write_bytes(b"this is no video")
        lines.append(f"{split}bad.mp4,{split}")
    path = folder / "clips.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def flags(manifest: Path, out: Path, num_workers: int) -> list[str]:
    return [
        *("tiny", "--manifest", str(manifest), "--out", str(out)),
        *("--num-workers", str(num_workers), "--max-reject-rate", "0.5"),
    ]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "preprocess.py"), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_when(driver: subprocess.Popen[bytes], out: Path, parts: int) -> set[str]:
    """SIGKILL the driver once so many units are committed; the units that are."""
    deadline = time.monotonic() + 120
    while len(list(out.glob("data/part-*"))) < parts:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    return {p.name for p in out.glob("data/part-*")}


def run_here(manifest: Path, out: Path) -> Dataset:
    main(Options(manifest=str(manifest), out=str(out), num_workers=0, max_reject_rate=0.5))
    return Dataset.open(str(out), FEATURES)


def test_a_driver_killed_in_the_middle_continues_to_the_same_digest(tmp_path: Path) -> None:
    manifest = make_clips(tmp_path, 4)
    out = tmp_path / "killed"
    done = kill_when(start(flags(manifest, out, 0)), out, 2)
    assert 2 <= len(done) < len(SPLITS)
    stamps = {name: (out / "data" / name).stat().st_mtime_ns for name in done}
    resumed = run_here(manifest, out)
    assert resumed.digest == run_here(manifest, tmp_path / "whole").digest
    assert resumed.manifest["counts"] == {"in": 20, "out": 16, "rejected": 4, "repeated": 0}
    # What was committed was not done again.
    assert stamps == {name: (out / "data" / name).stat().st_mtime_ns for name in done}


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_of_a_ray_pool_killed_in_the_middle_continues_to_the_same_digest(tmp_path: Path) -> None:
    manifest = make_clips(tmp_path, 12)
    out = tmp_path / "killed"
    kill_when(start(flags(manifest, out, 2)), out, 1)
    assert start(flags(manifest, out, 2)).wait() == 0
    resumed = Dataset.open(str(out), FEATURES)
    assert resumed.digest == run_here(manifest, tmp_path / "whole").digest
    assert resumed.manifest["counts"] == {"in": 52, "out": 48, "rejected": 4, "repeated": 0}
