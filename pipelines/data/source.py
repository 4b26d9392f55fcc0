"""The bytes behind a `uri`: a regular local file with its hash, whatever storage it comes from."""

import hashlib
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs
import tenacity

from pipelines.errors import EnvironmentFailed, InputError, MediaError

CHUNK_BYTES = 1 << 20
ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class LocalMedia:
    """A media file that can be opened here and now."""

    path: Path
    sha256: str


class SourceReader:
    """Opens sources one after the other; remembers the last hash, since windows of one file come in a row."""

    def __init__(self) -> None:
        self._last: tuple[tuple[str, int, int], str] | None = None

    @contextmanager
    def open(self, uri: str) -> Iterator[LocalMedia]:
        """The file behind an absolute path or a URI, for as long as the block lasts.

        Raises:
            MediaError: `missing`, or `not_media` for what is not a regular file.
            EnvironmentFailed: storage fails after retries.
        """
        if "://" in uri:
            with tempfile.NamedTemporaryFile(prefix="clip-") as copy:
                digest = _download(uri, Path(copy.name))
                yield LocalMedia(path=Path(copy.name), sha256=digest)
        else:
            path = Path(uri)
            yield LocalMedia(path=path, sha256=self._hash_of(path))

    def _hash_of(self, path: Path) -> str:
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise MediaError("not_media", "not a regular file")
            identity = (str(path), status.st_size, status.st_mtime_ns)
            if self._last is None or self._last[0] != identity:
                with path.open("rb") as file:
                    self._last = (identity, hashlib.file_digest(file, "sha256").hexdigest())
            return self._last[1]
        except OSError as error:
            raise MediaError("missing", f"cannot be read: {error.strerror}") from error


def _download(uri: str, target: Path) -> str:
    """Copy an object to a local file; its sha256."""
    try:
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            reraise=True,
        ):
            with attempt:
                return _copy(uri, target)
    except FileNotFoundError as error:
        raise MediaError("missing", "there is no such object") from error
    except OSError as error:
        if not _is_transient(error):
            raise InputError(f"{uri}: {error}; check the credentials and the bucket") from error
        raise EnvironmentFailed(f"{uri}: {error}, {ATTEMPTS} times; run the same command again") from error
    raise RuntimeError("tenacity ended without a result")


def _is_transient(error: BaseException) -> bool:
    """Whether trying again may help: neither an absent object nor a refusal gets better."""
    refused = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "403")
    return (
        isinstance(error, OSError)
        and not isinstance(error, FileNotFoundError | PermissionError)
        and not any(word in str(error) for word in refused)
    )


def _copy(uri: str, target: Path) -> str:
    filesystem, path = pafs.FileSystem.from_uri(uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(uri)
    digest, size = hashlib.sha256(), 0
    with filesystem.open_input_stream(path) as source, target.open("wb") as copy:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            copy.write(chunk)
            size += len(chunk)
    if info.size is not None and size != info.size:
        raise OSError(f"short read: {size} of {info.size} bytes")
    return digest.hexdigest()
