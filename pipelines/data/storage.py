"""A folder on any storage: local disk, NFS, or S3 (`s3://bucket/key`).

A name exists only when its content is whole, on every storage. Failures are told apart, retried and worded in one
place (`storage_faults`): what a caller sees is FileNotFoundError, FileExistsError, InputError or EnvironmentFailed.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from pipelines.data.local_files import LocalFiles, write_pieces
from pipelines.data.object_store import ObjectStore
from pipelines.errors import InputError

S3 = "s3://"
READ_THREADS = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Folder:
    """One folder of one storage; all names given to its methods are relative to it."""

    store: LocalFiles | ObjectStore
    path: str
    """Absolute path, or `bucket/key`."""
    uri: str

    @property
    def is_local(self) -> bool:
        """Whether it lies on a mounted filesystem (renames and appends work)."""
        return isinstance(self.store, LocalFiles)

    def join(self, name: str) -> str:
        """Path inside the filesystem of `name`; refuses names that leave the folder."""
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "" in parts:
            raise InputError(f"{self.uri}: '{name}' is not a plain relative name; the manifest was tampered with")
        return f"{self.path}/{name}"

    def local_path(self, name: str = "") -> Path:
        """Local path of `name`; raises InputError on an object store (where `local_artifacts` makes copies)."""
        if not self.is_local:
            raise InputError(f"{self.uri}: a mounted folder is needed here; give a local or NFS path")
        return Path(self.join(name) if name else self.path)

    def exists(self, name: str) -> bool:
        """Whether a file or a folder of that name is there."""
        return self.store.exists(self.join(name))

    def size_bytes(self, name: str) -> int | None:
        """Size of a file, None when it is not there."""
        return self.store.size_bytes(self.join(name))

    def list_names(self, name: str = "") -> list[str]:
        """Sorted base names of files and folders directly under `name` (default: the folder itself).

        Empty when it is not there; temporary files of writers are left out.
        """
        return sorted(self.store.list_sizes(self.join(name) if name else self.path, recursive=False))

    def list_infos(self, name: str = "", *, recursive: bool = False) -> dict[str, int]:
        """Name relative to `name` -> size in bytes of every file under it, sorted; one listing for all of them.

        With `recursive` also the files of the folders below, whose names then hold slashes.
        """
        sizes = self.store.list_sizes(self.join(name) if name else self.path, recursive=recursive)
        return {found: size for found, size in sorted(sizes.items()) if size is not None}

    def read_bytes(self, name: str) -> bytes:
        """Whole content of a file.

        Raises:
            FileNotFoundError: it is not there.
        """
        return self.store.use_pieces(self.join(name), b"".join)

    def read_many(self, names: Iterable[str], threads: int = READ_THREADS) -> Iterator[tuple[str, bytes]]:
        """(name, content) of many small files, in the order given, read side by side.

        Raises:
            FileNotFoundError: one is not there.
        """
        asked = list(names)
        with ThreadPoolExecutor(threads, thread_name_prefix="read-many") as pool:
            yield from zip(asked, pool.map(self.read_bytes, asked), strict=True)

    def sha256(self, name: str) -> str:
        """Hash of a file, read in pieces: a checkpoint may be larger than what is left of the memory."""

        def hash_of(pieces: Iterator[bytes]) -> str:
            found = hashlib.sha256()
            for piece in pieces:
                found.update(piece)
            return found.hexdigest()

        return self.store.use_pieces(self.join(name), hash_of)

    def copy_to(self, name: str, target: Path) -> str:
        """Copy a file to a path of this machine, in pieces; returns its sha256.

        Raises:
            FileNotFoundError: it is not there.
            EnvironmentFailed: as `write_bytes`, also for the disk of `target`.
        """
        return self.store.use_pieces(self.join(name), lambda pieces: write_pieces(target, pieces)[0])

    def use_file(self, name: str, use: Callable[[pa.NativeFile], T]) -> T:
        """What `use` makes of a file open for reading at random places, such as Parquet.

        On an object store `use` is called again, with the file opened anew, when a read fails on the way.

        Raises:
            FileNotFoundError: it is not there.
        """
        return self.store.use_file(self.join(name), use)

    def write_bytes(self, name: str, content: bytes, *, only_if_absent: bool = False) -> None:
        """Write a file that becomes visible only when complete.

        Raises:
            FileExistsError: `only_if_absent` and the name is taken; of many writers exactly one gets through.
            InputError: storage refuses (permissions, no such bucket).
            EnvironmentFailed: the disk is full, read-only or gone, or storage still fails after retries.
        """
        self.store.write(self.join(name), content, only_if_absent=only_if_absent)

    def new_file(self, name: str) -> AbstractContextManager[Path]:
        """Inside the block a path of this machine to write a file of any size to; after it the file is `name`, whole.

        On a mounted folder it is written beside its place and renamed; for an object store in the temporary folder, and
        uploaded in parts. What stood under the name is replaced; a block that fails leaves it as it was.

        Raises:
            InputError, EnvironmentFailed: as `write_bytes`.
        """
        return self.store.new_file(self.join(name))

    def delete(self, name: str) -> None:
        """Delete a file; none is no error."""
        self.store.delete(self.join(name))

    def delete_flat(self, name: str) -> None:
        """Delete a folder and the files directly in it; what holds folders, or is not there, stays as it is."""
        for file in self.list_infos(name):
            self.delete(f"{name}/{file}")
        self.store.remove_empty(self.join(name))

    def delete_tree(self, name: str) -> None:
        """Delete a folder and everything in it; on a mounted folder what cannot be deleted stays, without an error."""
        self.store.delete_tree(self.join(name))

    def remove_temporaries(self, name: str = "") -> int:
        """Delete what killed writers left half written directly under `name`; how many files that were.

        For the only writer of a folder, before it starts: it takes the files of living writers too.
        """
        return self.store.remove_temporaries(self.join(name) if name else self.path)


Location = str | Path | Folder
"""Where a folder is: a path, a URI, or the folder itself."""


def open_folder(location: Location) -> Folder:
    """A folder from an absolute or relative path or a URI (`s3://bucket/key`); nothing is created.

    One that is open already is given back.

    Raises:
        InputError: the URI's scheme is not supported, or it says more than bucket and key.
    """
    if isinstance(location, Folder):
        return location
    text = str(location)
    if "://" not in text:
        path = str(Path(text).absolute())
        return Folder(LocalFiles(), path, path)
    bucket, _, key = text.removeprefix(S3).partition("/")
    if not text.startswith(S3) or not bucket:
        raise InputError(f"cannot open '{text}'; use a path or an s3://bucket/key URI")
    if "@" in bucket or "?" in text:
        # Not repeated: what stands before the @ may be a key.
        raise InputError(
            "an s3:// URI holds bucket and key alone; give credentials, endpoint and region by the environment "
            "(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, AWS_REGION)"
        )
    path = f"{bucket}/{key.strip('/')}".rstrip("/")
    return Folder(ObjectStore(), path, S3 + path)
