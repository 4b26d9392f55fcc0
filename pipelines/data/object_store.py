"""S3 and what speaks its language, behind the same few operations as a local disk (`local_files`).

boto3 moves whole objects: it says in words why a request failed, sends and verifies checksums, and can put on the
condition that the name is free, which pyarrow (25) cannot. pyarrow reads at random places inside Parquet files. Both
follow one environment, as boto3 reads it: AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3), AWS_REGION or AWS_DEFAULT_REGION,
AWS_PROFILE, AWS_ACCESS_KEY_ID and so on. There are no folders: what a name with a slash stands for is made by its
first object.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import botocore.exceptions as aws
import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.data.scratch import scratch_folder
from pipelines.data.storage_faults import BrokenTransfer, Verdict, local_failure, retried, verdict_of

PIECE_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
"""Silence, not duration: a large object may take longer."""
MAX_CONNECTIONS = 32
ARROW_ATTEMPTS = 1
"""As with boto3: `storage_faults.retried` is the one who tries again."""
DEFAULT_REGION = "us-east-1"
PART_BYTES = 16 << 20
"""A file above this is uploaded in parts of it, of which boto3 holds at most ten in memory; they grow where a file
would have more than the 10,000 that a store takes."""
UPLOAD_THREADS = 4
PART_ATTEMPTS = 4
"""Of one part, by boto3: among the thousands of a large file some fail, and the file must not start again for each."""

T = TypeVar("T")


@dataclass(frozen=True)
class ObjectStore:
    """All buckets that this process can reach; a path is `bucket/key`. Holds nothing, so it travels to workers."""

    def size_bytes(self, path: str) -> int | None:
        """Size of an object, None when there is none."""
        bucket, key = _split(path)

        def ask() -> int | None:
            # Of all keys that begin with `key`, `key` itself is the first. HEAD would hide the reason of a refusal.
            found = _client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
            return int(found[0]["Size"]) if found and found[0]["Key"] == key else None

        return retried(ask, f"s3://{path}")

    def exists(self, path: str) -> bool:
        """Whether there is an object of that name, or one below it."""
        if self.size_bytes(path) is not None:
            return True
        bucket, key = _split(path)

        def ask() -> bool:
            return _client().list_objects_v2(Bucket=bucket, Prefix=_below(key), MaxKeys=1).get("KeyCount", 0) > 0

        return retried(ask, f"s3://{path}")

    def list_sizes(self, path: str, *, recursive: bool) -> dict[str, int | None]:
        """Name relative to `path` -> size in bytes, None for a folder (which only a flat listing names)."""
        bucket, key = _split(path)
        prefix = _below(key)
        delimiter: dict[str, str] = {} if recursive else {"Delimiter": "/"}

        def ask() -> dict[str, int | None]:
            found: dict[str, int | None] = {}
            for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **delimiter):
                for folder in page.get("CommonPrefixes", []):
                    found[folder["Prefix"][len(prefix) :].rstrip("/")] = None
                for item in page.get("Contents", []):
                    # The empty "folder" objects that other programs leave are nobody's content.
                    if not item["Key"].endswith("/"):
                        found[item["Key"][len(prefix) :]] = int(item["Size"])
            return found

        return retried(ask, f"s3://{path}")

    def use_pieces(
        self, path: str, use: Callable[[Iterator[bytes]], T], *, offset: int = 0, size_bytes: int | None = None
    ) -> T:
        """What `use` makes of the bytes of an object, in pieces; called again from the first byte after a failure.

        Length and, where the store keeps one, checksum are verified before the pieces end. A range that the object
        does not hold ends early, as a local file would.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return retried(lambda: use(_pieces(path, offset, size_bytes)), f"s3://{path}")

    def write(self, path: str, content: bytes, *, only_if_absent: bool) -> None:
        """Put an object of at most 5 GB; with its checksum, so a damaged upload is refused by the store.

        Raises:
            FileExistsError: `only_if_absent` and the name is taken.
        """
        bucket, key = _split(path)
        condition: dict[str, str] = {"IfNoneMatch": "*"} if only_if_absent else {}
        tries = 0

        def put() -> bool:
            nonlocal tries
            tries += 1
            try:
                _client().put_object(Bucket=bucket, Key=key, Body=content, **condition)
            except aws.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
                    raise
                # After a lost answer the object that is in the way may be our own.
                return tries > 1 and b"".join(_pieces(path, 0, None)) == content
            return True

        if not retried(put, f"s3://{path}"):
            raise FileExistsError(f"s3://{path}")

    @contextlib.contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        """A path in the temporary folder to write to; at the end of the block the file is uploaded and removed."""
        with scratch_folder() as scratch:
            written = scratch / "file"
            try:
                yield written
            except OSError as error:
                raise local_failure(error, written) from error
            retried(lambda: _upload(written, path), f"s3://{path}")

    def delete_tree(self, path: str) -> None:
        """Delete all objects below a name."""
        for name in self.list_sizes(path, recursive=True):
            self.delete(f"{path}/{name}")

    def delete(self, path: str) -> None:
        """Delete an object; none is no error."""
        bucket, key = _split(path)
        retried(lambda: _client().delete_object(Bucket=bucket, Key=key), f"s3://{path}")

    def remove_empty(self, path: str) -> None:
        """Nothing: an object store has no folders."""

    def remove_temporaries(self, path: str) -> int:
        """Nothing is ever half visible here."""
        return 0

    def use_file(self, path: str, use: Callable[[pa.NativeFile], T]) -> T:
        """What `use` makes of an object open for reading at random places; called again after a failure."""

        def attempt() -> T:
            try:
                with self.filesystem_of(path).open_input_file(path) as file:
                    return use(file)
            except OSError as error:
                if verdict_of(error) not in (Verdict.REFUSED, Verdict.ABSENT):
                    raise
                # pyarrow opens with HEAD; a listing says in words what was refused, and why.
                if self.size_bytes(path) is None:
                    raise FileNotFoundError(f"s3://{path}") from error
                raise BrokenTransfer(f"refused once, though it is there: {error}") from error

        return retried(attempt, f"s3://{path}")

    def filesystem_of(self, path: str) -> pafs.FileSystem:
        """pyarrow's view of the bucket of `path`."""
        return _arrow_filesystem(_split(path)[0], _environment())


def _upload(written: Path, path: str) -> None:
    """Put a file of any size as one object, visible when whole; each part with its checksum."""
    from boto3.s3.transfer import TransferConfig

    bucket, key = _split(path)
    settings = TransferConfig(
        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=UPLOAD_THREADS
    )
    # Not upload_file, which makes one error of all that can happen.
    with written.open("rb") as file:
        _client(PART_ATTEMPTS).upload_fileobj(file, bucket, key, Config=settings)


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key


def _below(key: str) -> str:
    return f"{key}/" if key else ""


def _pieces(path: str, offset: int, size_bytes: int | None) -> Iterator[bytes]:
    bucket, key = _split(path)
    wanted: dict[str, str] = {}
    if size_bytes == 0:
        return
    if offset or size_bytes is not None:
        last = "" if size_bytes is None else str(offset + size_bytes - 1)
        wanted = {"Range": f"bytes={offset}-{last}"}
    try:
        reply: Mapping[str, Any] = _client().get_object(Bucket=bucket, Key=key, **wanted)
    except aws.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 416:
            return
        raise
    # Not `with reply["Body"]`, which gives the bare stream: no checksum would be verified.
    with contextlib.closing(reply["Body"]) as body:
        if wanted and not str(reply.get("ContentRange", "")).startswith(f"bytes {offset}-"):
            raise BrokenTransfer(f"asked for bytes from {offset}, got '{reply.get('ContentRange')}'")
        received = 0
        while piece := body.read(PIECE_BYTES):
            received += len(piece)
            yield piece
    if received != reply["ContentLength"]:
        raise BrokenTransfer(f"short read: {received} of {reply['ContentLength']} bytes")


def _environment() -> tuple[tuple[str, str], ...]:
    """What decides where requests go and as whom; the process too, since connections do not survive a fork."""
    settings = ((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    return (("pid", str(os.getpid())), *sorted(settings))


def _client(attempts: int = 1) -> Any:
    """A client that makes so many attempts of its own; one, where `storage_faults.retried` is who tries again."""
    return _boto_client(_environment(), CONNECT_TIMEOUT_S, READ_TIMEOUT_S, attempts)


@functools.lru_cache(maxsize=8)
def _boto_client(
    environment: tuple[tuple[str, str], ...], connect_timeout_s: float, read_timeout_s: float, attempts: int
) -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.Session()
    return session.client(
        "s3",
        region_name=dict(environment).get("AWS_REGION") or session.region_name or DEFAULT_REGION,
        config=Config(
            retries={"total_max_attempts": attempts, "mode": "standard"},
            connect_timeout=connect_timeout_s,
            read_timeout=read_timeout_s,
            max_pool_connections=MAX_CONNECTIONS,
        ),
    )


@functools.lru_cache(maxsize=8)
def _arrow_filesystem(bucket: str, environment: tuple[tuple[str, str], ...]) -> pafs.FileSystem:
    meta = _client().meta
    endpoint = urlsplit(meta.endpoint_url)
    retries = pafs.AwsStandardS3RetryStrategy(max_attempts=ARROW_ATTEMPTS)
    if (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return pafs.S3FileSystem(region=pafs.resolve_s3_region(bucket), retry_strategy=retries)
    return pafs.S3FileSystem(
        region=meta.region_name,
        scheme=endpoint.scheme,
        endpoint_override=endpoint.netloc,
        retry_strategy=retries,
    )
