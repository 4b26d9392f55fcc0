"""Verified copies of an artifact's files on this machine, for what opens files by path: weights, above all.

They lie in the user's cache folder (`multisoundgen/artifacts` in `$XDG_CACHE_HOME`, by default `~/.cache`), under the
hash of the list of files they are of. So all processes of a machine share one copy, and an artifact that changed is
another one. A file gets its name by a rename, after its hash was found right: a half copy is never used. The lock only
keeps processes from fetching the same thing twice. What nobody has asked for in two weeks is deleted.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.storage import Folder
from pipelines.data.storage_faults import local_failure
from pipelines.errors import ContractError

LOCK = ".lock"
UNUSED_S = 14 * 24 * 3600.0
FETCH_THREADS = 4


@dataclass(frozen=True)
class Listed:
    """A file as a manifest knows it."""

    name: str
    size_bytes: int
    sha256: str


def cache_folder() -> Path:
    """The folder of all copies of this user on this machine."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "multisoundgen" / "artifacts"


def place_of(files: Sequence[Listed]) -> Path:
    """Where the copy of these files lies, or would lie."""
    key = json.dumps(sorted((file.name, file.size_bytes, file.sha256) for file in files))
    return cache_folder() / hashlib.sha256(key.encode()).hexdigest()


def copy_of(
    folder: Folder, files: Sequence[Listed], *, only: Collection[str] | None = None, trusting: bool = False
) -> Path:
    """The folder of this machine with the files of `folder`, of the given names alone, each of its size and sha256.

    Args:
        folder: where the files are, on any storage.
        files: all files of the artifact; they name the copy.
        only: names of those that are needed now; None: all.
        trusting: take what lies there with its size for whole, as another process has verified it just now.

    Raises:
        ContractError: a file is missing or is not what its manifest says.
        EnvironmentFailed: storage fails after retries, or the cache's disk is full.
    """
    place = place_of(files)
    wanted = [file for file in files if only is None or file.name in only]

    def bring(file: Listed) -> None:
        target = place / file.name
        if target.is_file() and target.stat().st_size == file.size_bytes and (trusting or _has_hash(target, file)):
            return
        _fetch(folder, file, target)

    with _locked(place), ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch") as pool:
        list(pool.map(bring, wanted))
    return place


def forget(place: Path) -> None:
    """Delete a copy; a process that has its files open keeps them."""
    shutil.rmtree(place, ignore_errors=True)


def _fetch(folder: Folder, file: Listed, target: Path) -> None:
    where = f"{folder.uri}/{file.name}"
    size = folder.size_bytes(file.name)
    if size is None:
        raise ContractError(f"{where} is missing; make the artifact again")
    if size != file.size_bytes:
        raise ContractError(f"{where} has {size} bytes instead of {file.size_bytes}; it was altered")
    pending = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if folder.copy_to(file.name, pending) != file.sha256:
            raise ContractError(f"{where} does not have the manifest's sha256; it was altered")
        pending.replace(target)
    except FileNotFoundError as error:
        raise ContractError(f"{where} vanished while it was copied; run the same command again") from error
    except OSError as error:
        raise local_failure(error, target) from error
    finally:
        pending.unlink(missing_ok=True)


def _has_hash(path: Path, file: Listed) -> bool:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Alone with a copy, among the processes of this machine; the copy counts as asked for now."""
    try:
        _remove_unused(place)
        place.mkdir(parents=True, exist_ok=True)
        os.utime(place)
        held = os.open(place / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise local_failure(error, place) from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _remove_unused(place: Path) -> None:
    oldest_s = time.time() - UNUSED_S
    for other in place.parent.glob("*"):
        with contextlib.suppress(OSError):
            if other != place and other.stat().st_mtime < oldest_s:
                forget(other)
