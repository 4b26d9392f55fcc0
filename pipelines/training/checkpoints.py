"""Which checkpoints exist, which of them can be trusted, and which may go.

A checkpoint is a folder `step_<n>-<attempt>` that all ranks write into; it counts only once its `COMPLETE` file lies
there, which names every file with its size and sha256. It is published last, by a rename, so a kill at any
moment leaves either a whole checkpoint or one that is skipped with the reason. A resumed run never
writes into a folder of an earlier attempt. Until then the ranks tell each other by receipts that lie in the folder.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPLETE = "COMPLETE"
FOLDER = re.compile(r"step_(\d{8})-(\d+)")
WEIGHTS = re.compile(r"weights_\d{5}_of_\d{5}\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint."""

    path: Path
    step: int
    world_size: int
    metric: float | None
    """The validation metric at that step, lower is better; None where there was no validation."""
    files: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name


@dataclass(frozen=True)
class Skipped:
    """A folder that is not used, and why."""

    name: str
    reason: str


def folder_name(root: Path, step: int) -> str:
    """Return the name of a fresh folder for `step`: one attempt above every folder that lies there for it."""
    attempts = [attempt for other, attempt in map(_parse, _folders(root)) if other == step]
    return f"step_{step:08d}-{max(attempts, default=0) + 1}"


def digest_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return {name: {size_bytes, sha256}} of files inside `folder`."""
    return {name: {"size_bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def weights_name(rank: int, world_size: int) -> str:
    """Return the name of the file with a rank's share of weights and optimizer."""
    return f"weights_{rank:05d}_of_{world_size:05d}.safetensors"


def is_weights(name: str) -> bool:
    """Whether this is the name of such a file."""
    return WEIGHTS.fullmatch(name) is not None


def sync(path: Path) -> None:
    """Bring a written file to the disk; raises OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def publish_receipt(folder: Path, rank: int, files: dict[str, dict[str, Any]], *, error: str | None) -> None:
    """Tell rank 0 that this rank's files are on the disk, or why they are not."""
    write_durably(folder / _receipt(rank), {"files": files, "error": error})


def read_receipt(folder: Path, rank: int) -> dict[str, dict[str, Any]] | None:
    """Return the files of a rank, or None while it writes; raises OSError with what the rank met."""
    try:
        content = json.loads((folder / _receipt(rank)).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if content["error"] is not None:
        raise OSError(f"rank {rank}: {content['error']}")
    return content["files"]


def _receipt(rank: int) -> str:
    return f"receipt_{rank:05d}.json"


def write_durably(path: Path, content: dict[str, Any]) -> None:
    """Write JSON by a rename, on the disk before it: what was there, or all of it. Several ranks may do so at once."""
    pending = path.with_name(f"{path.name}.{os.getpid()}.new")
    with pending.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    pending.replace(path)


def publish(
    folder: Path, *, step: int, world_size: int, metric: float | None, files: dict[str, dict[str, Any]]
) -> Checkpoint:
    """Make a written folder a checkpoint: fsync its `COMPLETE` under another name, then rename it."""
    content = {"step": step, "world_size": world_size, "metric": metric, "files": files}
    write_durably(folder / COMPLETE, content)
    return Checkpoint(folder, step, world_size, metric, files)


def newest_complete(root: Path) -> tuple[Checkpoint | None, list[Skipped]]:
    """Return the newest checkpoint whose every file is there with its size and sha256, and what was skipped."""
    skipped: list[Skipped] = []
    for name in sorted(_folders(root), key=_parse, reverse=True):
        checkpoint, reason = _open(root / name)
        if checkpoint is not None:
            reason = _first_fault(checkpoint)
            if reason is None:
                return checkpoint, skipped
        skipped.append(Skipped(name, reason or "unreadable"))
    return None, skipped


def retain(root: Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep_last` checkpoints, the best one, and those of every `keep_every` steps (0: none).

    Broken folders older than the newest checkpoint go too: nothing can ever use them.
    """
    complete = [checkpoint for name in _folders(root) if (checkpoint := _open(root / name)[0]) is not None]
    complete.sort(key=lambda checkpoint: _parse(checkpoint.name))
    keep = {checkpoint.name for checkpoint in complete[-keep_last:]}
    measured = [checkpoint for checkpoint in complete if checkpoint.metric is not None]
    if measured:
        keep.add(min(measured, key=lambda checkpoint: checkpoint.metric or 0.0).name)
    if keep_every > 0:
        keep |= {checkpoint.name for checkpoint in complete if checkpoint.step % keep_every == 0}
    for name in _folders(root):
        if name not in keep and complete and _parse(name) < _parse(complete[-1].name):
            shutil.rmtree(root / name, ignore_errors=True)


def _open(folder: Path) -> tuple[Checkpoint | None, str | None]:
    try:
        content = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return (
            Checkpoint(folder, content["step"], content["world_size"], content["metric"], content["files"]),
            None,
        )
    except FileNotFoundError:
        return None, f"no {COMPLETE} file: it was never finished"
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        return None, f"unreadable {COMPLETE} file ({type(error).__name__})"


def _first_fault(checkpoint: Checkpoint) -> str | None:
    for name, expected in checkpoint.files.items():
        path = checkpoint.path / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size_bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size_bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} does not have the recorded sha256"
    return None


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return [path.name for path in root.iterdir() if path.is_dir() and FOLDER.fullmatch(path.name)]


def _parse(name: str) -> tuple[int, int]:
    match = FOLDER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not the name of a checkpoint")
    return int(match[1]), int(match[2])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
