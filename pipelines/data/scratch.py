"""Folders in the temporary folder (TMPDIR) for files on their way to an object store; large ones, so none is forgotten.

A process holds a lock in each of its folders. What a killed one leaves is known by a lock that nobody holds, and is
deleted by the next process that makes such a folder.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.data.storage_faults import local_failure

PREFIX = "multisoundgen-"
LOCK = "lock"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder of this process, deleted with what is in it after the block.

    Raises:
        EnvironmentFailed: the temporary folder is full, read-only or gone.
    """
    place = Path(tempfile.gettempdir())
    try:
        _remove_forgotten(place)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        held = _hold(folder)
    except OSError as error:
        raise local_failure(error, place) from error
    try:
        content = folder / "content"
        content.mkdir()
        yield content
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _hold(folder: Path) -> int:
    """Lock a folder; the lock is held from the moment on at which it has its name."""
    pending = folder / f"{LOCK}.new"
    held = os.open(pending, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    pending.rename(folder / LOCK)
    return held


def _remove_forgotten(place: Path) -> None:
    for lock in place.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
