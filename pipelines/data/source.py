"""The bytes behind a `uri`: a regular local file with its hash, whatever storage it comes from.

A local file is opened where it lies. An object of a store, and a member of a tar, is copied to the temporary folder
(TMPDIR) in pieces, hashed on the way, and kept until another one is asked for, since windows of one file come in a row.
"""

import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelines.data.local_files import read_pieces, write_pieces
from pipelines.data.object_store import ObjectStore
from pipelines.data.storage import S3
from pipelines.data.storage_faults import is_machines_fault, local_failure
from pipelines.errors import MediaError

COPY_PREFIX = "clip-"


@dataclass(frozen=True, kw_only=True)
class LocalMedia:
    """A media file that can be opened here and now."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class _Range:
    """A file, or with `size_bytes` the bytes of it from `offset`."""

    uri: str
    offset: int
    size_bytes: int | None


class _Copy:
    """A copy in the temporary folder, deleted when nobody holds it any more."""

    def __init__(self, wanted: _Range) -> None:
        self.wanted = wanted
        with _on_disk(Path(tempfile.gettempdir())):
            handle = tempfile.NamedTemporaryFile(prefix=COPY_PREFIX, delete=False)  # noqa: SIM115
            handle.close()
        self.path = Path(handle.name)
        self._holders = 1
        self._lock = threading.Lock()
        try:
            self.sha256 = _copy(wanted, self.path)
        except BaseException:
            self.release()
            raise

    def hold(self) -> None:
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                with suppress(OSError):
                    self.path.unlink()


class SourceReader:
    """Opens sources; remembers the last hash and keeps the last copy. Close it when done."""

    def __init__(self) -> None:
        self._last: tuple[tuple[str, int, int], str] | None = None
        self._kept: _Copy | None = None

    def close(self) -> None:
        """Delete the last copy."""
        if self._kept is not None:
            self._kept.release()
            self._kept = None

    def __del__(self) -> None:
        self.close()

    @contextmanager
    def open(self, uri: str, offset: int | None = None, size_bytes: int | None = None) -> Iterator[LocalMedia]:
        """The file behind an absolute path or an `s3://` URI, for as long as the block lasts.

        Args:
            uri: the path or URI.
            offset: with `size_bytes`, where a member of a tar begins in it, in bytes (default 0).
            size_bytes: length of the member; the file that is given and its hash are those of the member alone.

        Raises:
            MediaError: `missing`; `bad_uri` for another kind of storage; `not_media` for what is not a regular file;
                `truncated` for a range that the file does not hold.
            InputError: storage refuses: credentials, no such bucket.
            EnvironmentFailed: storage fails after retries, or the temporary folder is full.
        """
        if offset is not None and size_bytes is None:
            raise ValueError("an offset needs a size")
        if "://" not in uri and size_bytes is None:
            path = Path(uri)
            yield LocalMedia(path=path, sha256=self._hash_of(path))
            return
        copy = self._copy_of(_Range(uri, offset or 0, size_bytes))
        try:
            yield LocalMedia(path=copy.path, sha256=copy.sha256)
        finally:
            copy.release()

    def _copy_of(self, wanted: _Range) -> _Copy:
        if self._kept is None or self._kept.wanted != wanted:
            # First the old one, then the new: room for two large files is not needed.
            self.close()
            self._kept = _Copy(wanted)
        self._kept.hold()
        return self._kept

    def _hash_of(self, path: Path) -> str:
        with _of_source(path):
            status = _regular(path)
            identity = (str(path), status.st_size, status.st_mtime_ns)
            if self._last is None or self._last[0] != identity:
                with path.open("rb") as file:
                    self._last = (identity, hashlib.file_digest(file, "sha256").hexdigest())
            return self._last[1]


def _copy(wanted: _Range, target: Path) -> str:
    """Copy a range to a local file; its sha256."""
    use = partial(write_pieces, target)
    if "://" not in wanted.uri:
        path = Path(wanted.uri)
        with _of_source(path):
            _regular(path)
            sha256, written = use(read_pieces(wanted.uri, wanted.offset, wanted.size_bytes))
    elif wanted.uri.startswith(S3) and not _has_surrogates(wanted.uri):
        try:
            sha256, written = ObjectStore().use_pieces(
                wanted.uri.removeprefix(S3), use, offset=wanted.offset, size_bytes=wanted.size_bytes
            )
        except FileNotFoundError as error:
            raise MediaError("missing", "there is no such object") from error
    else:
        raise MediaError("bad_uri", "not a path, nor an s3:// URI in UTF-8")
    if wanted.size_bytes is not None and written != wanted.size_bytes:
        raise MediaError("truncated", f"{written} of {wanted.size_bytes} bytes are there from byte {wanted.offset}")
    return sha256


@contextmanager
def _on_disk(target: Path) -> Iterator[None]:
    """A full temporary folder is the machine's fault, and not that of the clip."""
    try:
        yield
    except OSError as error:
        raise local_failure(error, target) from error


@contextmanager
def _of_source(path: Path) -> Iterator[None]:
    """What keeps a local source from being read: the clip's fault, or the machine's."""
    try:
        yield
    except OSError as error:
        if is_machines_fault(error):
            raise local_failure(error, path) from error
        raise MediaError("missing", f"cannot be read: {error.strerror}") from error


def _regular(path: Path) -> os.stat_result:
    """The status of a regular file; a FIFO or a device must not even be opened."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise MediaError("not_media", "not a regular file")
    return status


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)
