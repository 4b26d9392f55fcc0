"""Only whole checkpoints are used; every broken one is passed over with its reason."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.training import checkpoints
from tests.checkpoint_files import digest_files


def _write(root: Path, step: int, metric: float | None = None) -> Path:
    folder = root / checkpoints.folder_name(root, step)
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.pt").write_bytes(bytes([step]) * 100)
    (folder / "inner" / "optimizer.pt").write_bytes(b"o" * 50)
    files = digest_files(folder, ["inner/optimizer.pt", "weights.pt"])
    checkpoints.publish(folder, step=step, world_size=2, metric=metric, files=files)
    return folder


def test_the_newest_complete_checkpoint_is_found_with_what_it_says(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        _write(tmp_path, step)
    found, skipped = checkpoints.newest_complete(tmp_path)
    assert found is not None
    assert (found.step, found.world_size, skipped) == (30, 2, [])
    assert set(found.files) == {"weights.pt", "inner/optimizer.pt"}


def _flip(folder: Path) -> None:
    content = bytearray((folder / "weights.pt").read_bytes())
    content[3] ^= 1
    (folder / "weights.pt").write_bytes(content)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "never finished": (lambda folder: (folder / "COMPLETE").unlink(), "never finished"),
    "killed while publishing": (
        lambda folder: (folder / "COMPLETE").rename(folder / "COMPLETE.new"),
        "never finished",
    ),
    "manifest cut": (lambda folder: (folder / "COMPLETE").write_text('{"step": 2'), "unreadable COMPLETE"),
    "manifest of another kind": (lambda folder: (folder / "COMPLETE").write_text("{}"), "unreadable COMPLETE"),
    "rank file missing": (lambda folder: (folder / "inner" / "optimizer.pt").unlink(), "inner/optimizer.pt is missing"),
    "truncated": (lambda folder: (folder / "weights.pt").write_bytes(b"x" * 9), "9 bytes instead of 100"),
    "bit flipped": (_flip, "weights.pt does not have the recorded sha256"),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_checkpoint_is_passed_over_with_its_reason(tmp_path: Path, how: str) -> None:
    good = _write(tmp_path, 10)
    broken = _write(tmp_path, 20)
    break_it, reason = BREAKS[how]
    break_it(broken)
    found, skipped = checkpoints.newest_complete(tmp_path)
    assert found is not None
    assert found.path == good
    assert [entry.name for entry in skipped] == [broken.name]
    assert reason in skipped[0].reason


def test_a_new_attempt_never_writes_into_a_folder_that_is_there(tmp_path: Path) -> None:
    half = tmp_path / checkpoints.folder_name(tmp_path, 20)
    half.mkdir(parents=True)
    assert half.name == "step_00000020-1"
    assert checkpoints.folder_name(tmp_path, 20) == "step_00000020-2"


def test_retention_keeps_the_last_ones_and_the_best_and_clears_half_written_ones(tmp_path: Path) -> None:
    for step, metric in ((10, 0.5), (20, 0.1), (30, 0.4), (40, 0.3)):
        _write(tmp_path, step, metric)
    (tmp_path / "step_00000025-1").mkdir()
    (tmp_path / "step_00000050-1").mkdir()
    checkpoints.retain(tmp_path, keep_last=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    # 50 may be in the making by this very run.
    assert left == ["step_00000020-1", "step_00000030-1", "step_00000040-1", "step_00000050-1"]


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.newest_complete(tmp_path / "none") == (None, [])


def test_the_checkpoints_of_every_so_many_steps_stay(tmp_path: Path) -> None:
    for step in range(10, 70, 10):
        _write(tmp_path, step)
    checkpoints.retain(tmp_path, keep_last=1, keep_every=30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000030-1", "step_00000060-1"]


def test_what_a_rank_could_not_write_is_told_to_rank_0_with_its_number(tmp_path: Path) -> None:
    assert checkpoints.read_receipt(tmp_path, 1) is None
    checkpoints.publish_receipt(tmp_path, 1, {"a": {"size_bytes": 1, "sha256": "x"}}, error=None)
    assert checkpoints.read_receipt(tmp_path, 1) == {"a": {"size_bytes": 1, "sha256": "x"}}
    checkpoints.publish_receipt(tmp_path, 2, {}, error="No space left on device")
    with pytest.raises(OSError, match="rank 2: No space left"):
        checkpoints.read_receipt(tmp_path, 2)
