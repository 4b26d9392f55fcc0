"""Which checkpoints exist, which of them can be trusted, and which may go.

A checkpoint is a folder `step_<n>-<attempt>` that all ranks write into; it counts only once its `COMPLETE` file lies
there, which names every file with its size and sha256. It is published last and at once, so a kill at any
moment leaves either a whole checkpoint or one that is skipped with the reason. A resumed run never
writes into a folder of an earlier attempt. Until then the ranks tell each other by receipts that lie in the folder.

All of it lies on a mounted folder or in an object store, from where a checkpoint is copied to this machine to be read.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.local_copies import Listed, copy_of, forget, place_of
from pipelines.data.storage import Folder, Location, open_folder
from pipelines.errors import ContractError

COMPLETE = "COMPLETE"
FOLDER = re.compile(r"step_(\d{8})-(\d+)")
WEIGHTS = re.compile(r"weights_\d{5}_of_\d{5}\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint."""

    folder: Folder
    step: int
    world_size: int
    metric: float | None
    """The validation metric at that step, lower is better; None where there was no validation."""
    files: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.uri.rsplit("/", 1)[-1]

    @property
    def path(self) -> Path:
        """Where its files can be opened: on a mounted folder where they lie, else where `fetch` copies them to."""
        return self.folder.local_path() if self.folder.is_local else place_of(self._listed)

    def fetch(self, *, trusting: bool = False) -> None:
        """Have its files at `path`; nothing on a mounted folder.

        `trusting`: another process of this machine has verified what lies there just now.

        Raises:
            ContractError: a file is not what `COMPLETE` says.
        """
        if not self.folder.is_local:
            copy_of(self.folder, self._listed, trusting=trusting)

    def release(self) -> None:
        """Delete what `fetch` copied, once every rank has read it."""
        if not self.folder.is_local:
            forget(self.path)

    @property
    def _listed(self) -> list[Listed]:
        return [Listed(name, entry["size_bytes"], entry["sha256"]) for name, entry in self.files.items()]


@dataclass(frozen=True)
class Skipped:
    """A folder that is not used, and why."""

    name: str
    reason: str


def folder_name(root: Location, step: int) -> str:
    """Return the name of a fresh folder for `step`: one attempt above every folder that lies there for it."""
    attempts = [attempt for other, attempt in map(_parse, _folders(open_folder(root))) if other == step]
    return f"step_{step:08d}-{max(attempts, default=0) + 1}"


def weights_name(rank: int, world_size: int) -> str:
    """Return the name of the file with a rank's share of weights and optimizer."""
    return f"weights_{rank:05d}_of_{world_size:05d}.safetensors"


def is_weights(name: str) -> bool:
    """Whether this is the name of such a file."""
    return WEIGHTS.fullmatch(name) is not None


def publish_receipt(folder: Location, rank: int, files: dict[str, dict[str, Any]], *, error: str | None) -> None:
    """Tell rank 0 that this rank's files are on the storage, or why they are not."""
    write_json(open_folder(folder), _receipt(rank), {"files": files, "error": error})


def read_receipt(folder: Location, rank: int) -> dict[str, dict[str, Any]] | None:
    """Return the files of a rank, or None while it writes; raises OSError with what the rank met."""
    try:
        content = json.loads(open_folder(folder).read_bytes(_receipt(rank)))
    except FileNotFoundError:
        return None
    if content["error"] is not None:
        raise OSError(f"rank {rank}: {content['error']}")
    return content["files"]


def _receipt(rank: int) -> str:
    return f"receipt_{rank:05d}.json"


def write_json(folder: Folder, name: str, content: dict[str, Any]) -> None:
    """Write JSON for good: what was there, or all of it. Several ranks may do so at once."""
    folder.write_bytes(name, json.dumps(content, indent=1).encode())


def publish(
    folder: Location, *, step: int, world_size: int, metric: float | None, files: dict[str, dict[str, Any]]
) -> Checkpoint:
    """Make a written folder a checkpoint: its `COMPLETE` is there all at once, and last."""
    content = {"step": step, "world_size": world_size, "metric": metric, "files": files}
    place = open_folder(folder)
    write_json(place, COMPLETE, content)
    return Checkpoint(place, step, world_size, metric, files)


def newest_complete(root: Location) -> tuple[Checkpoint | None, list[Skipped]]:
    """Return the newest checkpoint whose every file is there with its size and sha256, and what was skipped.

    Of an object store it has been fetched: a file is read once, to be copied and verified.
    """
    place = open_folder(root)
    skipped: list[Skipped] = []
    for name in sorted(_folders(place), key=_parse, reverse=True):
        checkpoint, reason = _open(place, name)
        if checkpoint is not None:
            reason = _first_fault(checkpoint)
            if reason is None:
                return checkpoint, skipped
        skipped.append(Skipped(name, reason or "unreadable"))
    return None, skipped


def retain(root: Location, keep_last: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep_last` checkpoints, the best one, and those of every `keep_every` steps (0: none).

    Broken folders older than the newest checkpoint go too: nothing can ever use them.
    """
    place = open_folder(root)
    names = _folders(place)
    complete = [checkpoint for name in names if (checkpoint := _open(place, name)[0]) is not None]
    complete.sort(key=lambda checkpoint: _parse(checkpoint.name))
    keep = {checkpoint.name for checkpoint in complete[-keep_last:]}
    measured = [checkpoint for checkpoint in complete if checkpoint.metric is not None]
    if measured:
        keep.add(min(measured, key=lambda checkpoint: checkpoint.metric or 0.0).name)
    if keep_every > 0:
        keep |= {checkpoint.name for checkpoint in complete if checkpoint.step % keep_every == 0}
    for name in names:
        if name not in keep and complete and _parse(name) < _parse(complete[-1].name):
            place.delete_tree(name)


def _open(root: Folder, name: str) -> tuple[Checkpoint | None, str | None]:
    try:
        content = json.loads(root.read_bytes(f"{name}/{COMPLETE}"))
        folder = open_folder(f"{root.uri}/{name}")
        return (
            Checkpoint(folder, content["step"], content["world_size"], content["metric"], content["files"]),
            None,
        )
    except FileNotFoundError:
        return None, f"no {COMPLETE} file: it was never finished"
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        return None, f"unreadable {COMPLETE} file ({type(error).__name__})"


def _first_fault(checkpoint: Checkpoint) -> str | None:
    sizes = checkpoint.folder.list_infos(recursive=True)
    for name, expected in checkpoint.files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != expected["size_bytes"]:
            return f"{name} has {sizes[name]} bytes instead of {expected['size_bytes']}"
    if not checkpoint.folder.is_local:
        try:
            checkpoint.fetch()
        except ContractError as error:
            checkpoint.release()
            return str(error)
        return None
    for name, expected in checkpoint.files.items():
        if checkpoint.folder.sha256(name) != expected["sha256"]:
            return f"{name} does not have the recorded sha256"
    return None


def _folders(root: Folder) -> list[str]:
    return [name for name in root.list_names() if FOLDER.fullmatch(name)]


def _parse(name: str) -> tuple[int, int]:
    match = FOLDER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not the name of a checkpoint")
    return int(match[1]), int(match[2])
