"""A mounted file system (local disk, NFS), behind the same few operations as an object store (`object_store`).

A file is written under a temporary name in its own folder, flushed and then renamed, or linked where it must not
replace another: so a name exists only when its content is whole.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.data.storage_faults import local_failure

TEMPORARY_SUFFIX = ".tmp"
PIECE_BYTES = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class LocalFiles:
    """All mounted file systems; a path is an absolute one."""

    def size_bytes(self, path: str) -> int | None:
        """Size of a file, None when there is none."""
        with _translated(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = Path(path).stat()
            return status.st_size if stat.S_ISREG(status.st_mode) else None
        return None

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder of that name."""
        with _translated(path):
            return Path(path).exists()

    def list_sizes(self, path: str, *, recursive: bool) -> dict[str, int | None]:
        """Name relative to `path` -> size in bytes, None for a folder (which only a flat listing names).

        Temporary files are left out, and so is what vanishes while it is listed.
        """
        found: dict[str, int | None] = {}
        with _translated(path), contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(path):
                if entry.is_dir():
                    if recursive:
                        below = self.list_sizes(entry.path, recursive=True)
                        found.update({f"{entry.name}/{name}": size for name, size in below.items()})
                    else:
                        found[entry.name] = None
                elif not _is_temporary(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        found[entry.name] = entry.stat().st_size
        return found

    def use_pieces(
        self, path: str, use: Callable[[Iterator[bytes]], T], *, offset: int = 0, size_bytes: int | None = None
    ) -> T:
        """What `use` makes of the bytes of a file, in pieces; a range that the file does not hold ends early.

        Raises:
            FileNotFoundError: there is no such file.
        """
        with _translated(path):
            return use(read_pieces(path, offset, size_bytes))

    def write(self, path: str, content: bytes, *, only_if_absent: bool) -> None:
        """Write a file that becomes visible only when complete; its folder is made.

        Raises:
            FileExistsError: `only_if_absent` and the name is taken.
        """
        with _translated(path), _beside(Path(path)) as temporary:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if only_if_absent:
                _link(temporary, Path(path))
            else:
                temporary.replace(path)

    @contextlib.contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        """A path to write to; at the end of the block the file is brought to the disk and renamed to `path`."""
        with _translated(path), _beside(Path(path)) as temporary:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)

    def delete(self, path: str) -> None:
        """Delete a file; none is no error."""
        with _translated(path):
            Path(path).unlink(missing_ok=True)

    def remove_empty(self, path: str) -> None:
        """Remove a folder that holds nothing; one that does, or is not there, stays as it is."""
        with contextlib.suppress(OSError):
            Path(path).rmdir()

    def delete_tree(self, path: str) -> None:
        """Delete a folder with all that is in it; what cannot be deleted stays."""
        shutil.rmtree(path, ignore_errors=True)

    def remove_temporaries(self, path: str) -> int:
        """Delete what writers that were killed left directly in a folder; how many files that were."""
        removed = 0
        with _translated(path), contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(path):
                if _is_temporary(entry.name):
                    Path(entry.path).unlink(missing_ok=True)
                    removed += 1
        return removed

    def use_file(self, path: str, use: Callable[[pa.NativeFile], T]) -> T:
        """What `use` makes of a file open for reading at random places."""
        with _translated(path), self.filesystem_of(path).open_input_file(path) as file:
            return use(file)

    def filesystem_of(self, path: str) -> pafs.FileSystem:
        """pyarrow's view of it."""
        return pafs.LocalFileSystem()


def read_pieces(path: str, offset: int, size_bytes: int | None) -> Iterator[bytes]:
    """The bytes of a file from `offset`, at most `size_bytes` of them, in pieces; raises OSError as it comes."""
    left = size_bytes
    with Path(path).open("rb") as file:
        file.seek(offset)
        while left != 0 and (piece := file.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left))):
            left = None if left is None else left - len(piece)
            yield piece


def write_pieces(target: Path, pieces: Iterator[bytes]) -> tuple[str, int]:
    """Write a file from pieces; its sha256 and its size in bytes.

    What the pieces raise passes as it is; what the disk raises is an EnvironmentFailed, as everywhere here.
    """
    digest, written = hashlib.sha256(), 0
    with _translated(str(target)):
        file = target.open("wb")
    with file:
        for piece in pieces:
            digest.update(piece)
            with _translated(str(target)):
                file.write(piece)
            written += len(piece)
        with _translated(str(target)):
            file.flush()
    return digest.hexdigest(), written


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary name in the folder of `target`, which is made; gone after the block."""
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        _make_folder(target.parent)
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    """Failures of the file system as errors with a next step; absent and taken names stay what they are."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise local_failure(error, path) from error


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        # A file of that name: not to be taken for a name that somebody else won.
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def _link(temporary: Path, target: Path) -> None:
    try:
        target.hardlink_to(temporary)
    except FileExistsError:
        # NFS may say so when its first answer was lost: two names of the file mean that the link was made.
        if temporary.stat().st_nlink != 2:
            raise
