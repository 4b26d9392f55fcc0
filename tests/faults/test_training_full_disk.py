"""A training whose disk is really full: in the thread that writes a checkpoint, and where the journal is appended."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.errors import EnvironmentFailed
from pipelines.training import checkpoints
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder, TrainingResult
from pipelines.training.options import TrainingOptions
from tests.faults.small_disk import SmallDisk
from tests.feature_factory import write_features
from tests.toy_objective import ToyObjective
from tests.training_runs import losses_of, run_training

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0
EXPORT = "toy.safetensors"
OPTIONS = TrainingOptions(steps=9, batch_size=8, lr=3e-2, ema_decay=0.9, checkpoint_every=3)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_features(tmp_path_factory.mktemp("toy") / "features", {"train": 40, "val": 16}))


def _fill(disk: Path, left_bytes: int) -> None:
    """Leave so many bytes of room."""
    room = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize - left_bytes))


def _wait_for(condition: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < LIMIT_S
        time.sleep(0.01)


def _train_and_fill(
    features: str, options: TrainingOptions, out: Path, *, after_checkpoint: int, left_bytes: int
) -> TrainingResult:
    """Train; two steps after a checkpoint, once that is whole, the disk of `out` is filled."""
    out.mkdir(exist_ok=True)
    complete = out / "checkpoints" / f"step_{after_checkpoint:08d}-1" / "COMPLETE"

    def report(step: int, metrics: dict[str, float]) -> None:
        if step == after_checkpoint + 2:
            _wait_for(complete.exists)
            _fill(out.parent, left_bytes)

    return fit(TrainingOrder(ToyObjective(features=features), options, str(out)), num_workers=0, report=report)


def _assert_same(out: Path, whole: Path) -> None:
    assert losses_of(out) == losses_of(whole)
    assert (out / EXPORT).read_bytes() == (whole / EXPORT).read_bytes()


def test_a_disk_that_is_full_under_the_writing_thread_leaves_the_checkpoint_before_and_the_run_goes_on_from_it(
    features: str, tmp_path: Path
) -> None:
    with SmallDisk(tmp_path / "disk", "size=4m") as disk:
        out = disk.path / "out"
        line = r"step 6 cannot be written \(.*step_00000006-1/weights.*No space left on device; the disk is full"
        with pytest.raises(EnvironmentFailed, match=line):
            # Room for the journal, and for no 34 KB of weights and moments.
            _train_and_fill(features, OPTIONS, out, after_checkpoint=3, left_bytes=16_000)
        found, skipped = checkpoints.newest_complete(out / "checkpoints")
        assert found is not None
        assert (found.step, [entry.name for entry in skipped]) == (3, ["step_00000006-1"])
        assert [path.name for path in (out / "checkpoints" / "step_00000006-1").iterdir()] == ["receipt_00000.json"]
        (disk.path / "filler").unlink()
        result = run_training(ToyObjective(features=features), OPTIONS, out)
        run_training(ToyObjective(features=features), OPTIONS, tmp_path / "whole")
        assert result.notes == ["checkpoint step_00000006-1 passed over: no COMPLETE file: it was never finished"]
        _assert_same(out, tmp_path / "whole")


def test_a_disk_that_is_full_under_the_journal_is_a_clean_stop_that_resumes(features: str, tmp_path: Path) -> None:
    # Between two checkpoints more lines than the last page of the file has room for.
    options = dataclasses.replace(OPTIONS, steps=60, checkpoint_every=30)
    with SmallDisk(tmp_path / "disk", "size=4m") as disk:
        out = disk.path / "out"
        line = r"out/metrics.jsonl: No space left on device; the disk is full .*run the same command again"
        with pytest.raises(EnvironmentFailed, match=line):
            _train_and_fill(features, options, out, after_checkpoint=30, left_bytes=0)
        written = (out / "metrics.jsonl").read_bytes()
        # While it is full the same command says the same, and takes nothing away.
        with pytest.raises(EnvironmentFailed, match=line):
            run_training(ToyObjective(features=features), options, out)
        assert (out / "metrics.jsonl").read_bytes() == written
        (disk.path / "filler").unlink()
        assert run_training(ToyObjective(features=features), options, out).notes == []
        run_training(ToyObjective(features=features), options, tmp_path / "whole")
        _assert_same(out, tmp_path / "whole")


@pytest.mark.slow
def test_a_job_on_a_disk_with_room_for_one_checkpoint_ends_with_exit_code_3_and_resumes(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", {"train": 40, "val": 8})
    flags = ["--size", "tiny", "--features", str(features), "--num-workers", "0", "--ema-width", "None"]
    flags += ["--ema-decay", "0.9", "--steps", "6", "--batch-size", "8", "--lr", "1e-3", "--checkpoint-every", "2"]
    job = [sys.executable, str(ROOT / "jobs" / "train_mmdit.py"), *flags]
    # A start of 9 MB, and checkpoints of 35.
    with SmallDisk(tmp_path / "disk", "size=70m") as disk:
        out = disk.path / "out"
        command = [*job, "--out", str(out)]
        stopped = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert stopped.returncode == 3, stopped.stderr
        last = stopped.stderr.strip().splitlines()[-1]
        assert last.startswith(f"train_mmdit: {out}/checkpoints: the checkpoint of step 4 cannot be written")
        assert "No space left on device; the disk is full" in last
        assert last.rstrip(")").endswith("run the same command again")
        assert "Traceback" not in stopped.stderr
        found, _ = checkpoints.newest_complete(out / "checkpoints")
        assert found is not None
        assert found.step == 2
        disk.remount("size=400m")
        for place in (str(out), str(tmp_path / "whole")):
            subprocess.run([*job, "--out", place], capture_output=True, timeout=LIMIT_S, check=True)
        assert losses_of(out) == losses_of(tmp_path / "whole")
        network = "network.safetensors"
        assert (out / network).read_bytes() == (tmp_path / "whole" / network).read_bytes()
