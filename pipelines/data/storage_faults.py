"""What went wrong with storage, whether trying again may help, and what a person has to do: one place for all of it.

    transient  5xx, SlowDown, timeouts, resets, short or damaged bodies -> tried again with growing, random waits
    refused    403, no such bucket, no credentials                      -> InputError at once, with the URI
    absent     no such object                                           -> FileNotFoundError, for the caller to judge
    local      a full, read-only or broken disk, too many open files    -> EnvironmentFailed, with the next step

An object store's answer to HEAD has no body and hides its reason, so nothing here rests on one.
"""

import errno
import os
import re
from collections.abc import Callable
from enum import Enum
from typing import NoReturn, TypeVar

import botocore.exceptions as aws
import botocore.parsers
import tenacity
import urllib3.exceptions
from safetensors import SafetensorError

from pipelines.errors import EnvironmentFailed, InputError, MediaError, PipelineError

ATTEMPTS = 8
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 20.0
AGAIN = "run the same command again"

T = TypeVar("T")


class Verdict(Enum):
    """What a failure of storage means."""

    TRANSIENT = "transient"
    REFUSED = "refused"
    ABSENT = "absent"
    LOCAL = "local"
    OTHER = "other"
    """No failure of storage at all: passed on as it is."""


class BrokenTransfer(OSError):
    """A body that ended early or that is not what was asked for; worth another try."""


_TRANSIENT_CODES = frozenset(
    {
        *("SlowDown", "ServiceUnavailable", "InternalError", "InternalFailure", "OperationAborted"),
        *("RequestTimeout", "RequestTimeoutException", "RequestTimeTooSkewed", "ConditionalRequestConflict"),
        *("Throttling", "ThrottlingException", "RequestThrottled", "RequestLimitExceeded", "TooManyRequests"),
        *("BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch"),
    }
)
"""A skewed clock and a damaged upload come with 403 and 400, and still get better."""
_TRANSIENT_STATUS = frozenset({408, 429})
_TRANSIENT_AWS = (
    *(aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError, aws.ChecksumError, aws.FlexibleChecksumError),
    *(aws.CredentialRetrievalError, aws.MetadataRetrievalError, botocore.parsers.ResponseParserError),
    # Some of what breaks in the middle of a body reaches us as it is.
    *(urllib3.exceptions.HTTPError, ConnectionError, TimeoutError),
)
_SYSTEM_ERROR = re.compile(r"os error (\d+)")
_ARROW_ERROR = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))?")
_ARROW_REFUSED = frozenset(
    {
        *("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH"),
        *("INVALID_CLIENT_TOKEN_ID", "MISSING_AUTHENTICATION_TOKEN", "UNRECOGNIZED_CLIENT", "VALIDATION"),
    }
)
_ADVICE = {
    errno.ENOSPC: f"the disk is full (or has no inodes left): free some and {AGAIN}",
    errno.EDQUOT: f"the quota is used up: free some of it or have it raised, and {AGAIN}",
    errno.EFBIG: f"files may not be that large here (ulimit -f, or the file system): allow it and {AGAIN}",
    errno.EROFS: f"it is mounted read-only: mount it for writing and {AGAIN}, or give another folder",
    errno.EIO: f"the disk reports an error: look at it (dmesg) and {AGAIN}",
    errno.EMFILE: f"this process has too many files open: raise ulimit -n and {AGAIN}",
    errno.ENFILE: f"this machine has too many files open: raise fs.file-max and {AGAIN}",
    errno.ENOMEM: f"the machine has no memory left: free some and {AGAIN}",
}
_WRONG_PLACE = {
    errno.EACCES: "check its owner and its permissions",
    errno.EPERM: "check its owner and its permissions",
    errno.ENOTDIR: "a part of the path is a file; give another one",
    errno.EISDIR: "it is a folder, and a file is needed",
    errno.ENAMETOOLONG: "the name is too long for this storage",
    errno.ELOOP: "its links lead in a circle",
}


def verdict_of(error: BaseException) -> Verdict:
    """What a failure means, whether boto3, pyarrow or the operating system raised it."""
    if isinstance(error, aws.ClientError):
        return _verdict_of_answer(error)
    if isinstance(error, (BrokenTransfer, *_TRANSIENT_AWS)):
        return Verdict.TRANSIENT
    if isinstance(error, aws.BotoCoreError):
        # No or wrong credentials, region or profile, a name that cannot be one: nothing that a retry mends.
        return Verdict.REFUSED
    if isinstance(error, OSError) and not isinstance(error, FileExistsError):
        return _verdict_of_system(error)
    return Verdict.OTHER


def _verdict_of_system(error: OSError) -> Verdict:
    """Of the operating system, and of pyarrow, which words what a store answers as an OSError."""
    if isinstance(error, FileNotFoundError):
        return Verdict.ABSENT
    found = _ARROW_ERROR.search(str(error))
    if found is None:
        return Verdict.LOCAL
    refused = found[1] in _ARROW_REFUSED or (found[2] or "").startswith("4")
    return Verdict.REFUSED if refused and int(found[2] or 0) not in _TRANSIENT_STATUS else Verdict.TRANSIENT


def _verdict_of_answer(error: aws.ClientError) -> Verdict:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS or status >= 500 or status < 300:
        # An error inside a 200 has been seen; like the others it gets better.
        return Verdict.TRANSIENT
    return Verdict.ABSENT if code in ("NoSuchKey", "404") else Verdict.REFUSED


def retried(action: Callable[[], T], where: str) -> T:
    """Result of `action`, tried again while the failure is a transient one; it starts from the beginning each time.

    Args:
        action: what to do.
        where: path or URI for the message.

    Raises:
        FileNotFoundError: there is no such object or file.
        InputError: storage refuses, or the place cannot be right.
        EnvironmentFailed: still failing after all attempts, or the machine's own fault.
    """
    trying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: verdict_of(error) is Verdict.TRANSIENT),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        reraise=True,
    )
    try:
        return trying(action)
    except (PipelineError, MediaError):
        raise
    except Exception as error:
        raise_translated(error, where)


def raise_translated(error: Exception, where: str) -> NoReturn:
    """Raise what `retried` documents for a failure at `where`; what is no failure of storage is raised unchanged."""
    verdict = verdict_of(error)
    if verdict is Verdict.TRANSIENT:
        raise EnvironmentFailed(f"{where}: {error}, {ATTEMPTS} times; {AGAIN}") from error
    if verdict is Verdict.REFUSED:
        raise InputError(
            f"{where}: {error}; check the bucket, the credentials and what they allow, and AWS_ENDPOINT_URL"
        ) from error
    if verdict is Verdict.ABSENT:
        raise FileNotFoundError(errno.ENOENT, "there is no such object", where) from error
    if verdict is Verdict.LOCAL and isinstance(error, OSError):
        raise local_failure(error, where) from error
    raise error


def local_failure(error: OSError, where: str | os.PathLike[str]) -> PipelineError:
    """The error to raise for a failure of a mounted file system at `where`."""
    reason = error.strerror or str(error)
    if error.errno in _WRONG_PLACE:
        return InputError(f"{os.fspath(where)}: {reason}; {_WRONG_PLACE[error.errno]}")
    advice = _ADVICE.get(error.errno or 0, f"mend the storage and {AGAIN}")
    return EnvironmentFailed(f"{os.fspath(where)}: {reason}; {advice}")


def weights_failure(error: OSError | SafetensorError, where: str | os.PathLike[str]) -> PipelineError:
    """The error to raise where weights cannot be written: safetensors words what the operating system says."""
    if isinstance(error, SafetensorError):
        found = _SYSTEM_ERROR.search(str(error))
        number = int(found[1]) if found else errno.EIO
        error = OSError(number, os.strerror(number) if found else str(error).splitlines()[0])
    return local_failure(error, where)


def is_machines_fault(error: OSError) -> bool:
    """Whether a local failure says something about the machine, and nothing about the file that was touched."""
    return error.errno in _ADVICE or error.errno in (errno.ESTALE, errno.ETIMEDOUT)
