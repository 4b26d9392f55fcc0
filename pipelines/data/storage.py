"""A folder on any storage: local disk, NFS or S3, through pyarrow filesystems.

Local writes go to a temporary name in the same folder, are flushed and renamed, so a name exists only when its content
is whole; on an object store one put has the same effect.
"""

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from pipelines.errors import EnvironmentFailed, InputError

TEMPORARY_SUFFIX = ".tmp"
PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class Folder:
    """One folder of one filesystem; all names given to its methods are relative to it."""

    filesystem: pafs.FileSystem
    path: str
    uri: str

    @property
    def is_local(self) -> bool:
        """Whether it lies on a mounted filesystem (renames and appends work)."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def join(self, name: str) -> str:
        """Path inside the filesystem of `name`; refuses names that leave the folder."""
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "" in parts:
            raise InputError(f"{self.uri}: '{name}' is not a plain relative name; the manifest was tampered with")
        return f"{self.path}/{name}"

    def local_path(self, name: str = "") -> Path:
        """Local path of `name`; raises InputError on an object store."""
        if not self.is_local:
            raise InputError(f"{self.uri}: this stage needs a mounted folder; give a local or NFS path")
        return Path(self.join(name) if name else self.path)

    def exists(self, name: str) -> bool:
        """Whether a file or a folder of that name is there."""
        return self.filesystem.get_file_info(self.join(name)).type != pafs.FileType.NotFound

    def size_bytes(self, name: str) -> int | None:
        """Size of a file, None when it is not there."""
        info = self.filesystem.get_file_info(self.join(name))
        return info.size if info.type == pafs.FileType.File else None

    def list_names(self, name: str = "") -> list[str]:
        """Sorted base names directly under `name` (default: the folder itself); empty when it is not there."""
        base = self.join(name) if name else self.path
        infos = self.filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def list_sizes(self, name: str) -> dict[str, int]:
        """Size in bytes of each file directly under `name`, by base name, in one listing."""
        infos = self.filesystem.get_file_info(pafs.FileSelector(self.join(name), allow_not_found=True))
        return {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; what is not there is no error."""
        path = self.join(name)
        kind = self.filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(path)
        elif kind != pafs.FileType.NotFound:
            self.filesystem.delete_file(path)

    def read_bytes(self, name: str) -> bytes:
        """Whole content of a file."""
        with self.filesystem.open_input_stream(self.join(name)) as stream:
            return stream.read()

    def sha256(self, name: str) -> str:
        """Hash of a file, read in pieces: a checkpoint may be larger than what is left of the memory."""
        found = hashlib.sha256()
        with self.filesystem.open_input_stream(self.join(name)) as stream:
            while piece := stream.read(PIECE_BYTES):
                found.update(piece)
        return found.hexdigest()

    def write_bytes(self, name: str, content: bytes, *, only_if_absent: bool = False) -> None:
        """Write a file that becomes visible only when complete.

        Raises:
            FileExistsError: `only_if_absent` and the name is taken.
            EnvironmentFailed: the disk is full, read-only or gone.
        """
        path = self.join(name)
        try:
            self.filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
            if self.is_local:
                _write_local(Path(path), content, only_if_absent)
                return
            if only_if_absent and self.exists(name):
                raise FileExistsError(path)
            with self.filesystem.open_output_stream(path) as stream:
                stream.write(content)
        except FileExistsError:
            raise
        except OSError as error:
            raise EnvironmentFailed(
                f"cannot write {path}: {error}; free or mount the storage and run the same command again"
            ) from error


def _write_local(path: Path, content: bytes, only_if_absent: bool) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if only_if_absent:
            os.link(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_folder(location: str | Path) -> Folder:
    """A folder from an absolute or relative path or a URI (`s3://bucket/key`); nothing is created.

    Raises:
        InputError: the URI's scheme is not supported.
    """
    text = str(location)
    if "://" not in text:
        path = str(Path(text).absolute())
        return Folder(pafs.LocalFileSystem(), path, path)
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot open '{text}': {error}; use a path or an s3:// URI") from error
    return Folder(filesystem, path.rstrip("/"), text.rstrip("/"))
