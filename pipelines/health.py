"""Is this machine fit for the work? Each check is one line: what was looked at, what was found, what to do.

Libraries are asked in child processes: a broken wheel or driver may crash or hang whoever imports it, and the doctor
has to survive its patient.
"""

import os
import shutil
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.tracking_journal import without_credentials

Verdict = Literal["ok", "warn", "fail"]
GIB = 2**30
LEAST_DISK_BYTES = 2 * GIB
ENOUGH_DISK_BYTES = 20 * GIB
ENOUGH_SHM_BYTES = 1 * GIB
LIBRARY_LIMIT_S = 120.0
PROBE_LIMIT_S = 5.0
LEAST_PYTHON = (3, 11)
LIBRARIES = {
    "torch": (
        "import torch; n = torch.cuda.device_count();"
        "print(torch.__version__, 'CUDA', torch.version.cuda, '|', n, 'devices',"
        "*(f'[{torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB]'"
        " for i in range(n)))"
    ),
    "ray": "import ray; print(ray.__version__)",
    "deepspeed": "from importlib.metadata import version; print(version('deepspeed'))",
    "mlflow": "from importlib.metadata import version; print(version('mlflow'))",
    "pyarrow": "import pyarrow; print(pyarrow.__version__)",
    "av": (
        "import av; print(av.__version__, '| FFmpeg', av.ffmpeg_version_info,"
        "*(f'{k} {\".\".join(map(str, v))}' for k, v in sorted(av.library_versions.items())))"
    ),
}
"""How each library tells about itself, as a program for a child process."""


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    verdict: Verdict
    detail: str

    def line(self) -> str:
        """The finding as one line of text."""
        return f"{self.verdict:4}  {self.name:12} {self.detail}"


def check_python() -> Check:
    """Whether this Python is new enough."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < LEAST_PYTHON:
        return Check("python", "fail", f"{found}; 3.11 or newer is needed")
    return Check("python", "ok", f"{found} ({sys.executable})")


def check_library(name: str) -> Check:
    """Whether a library of `LIBRARIES` imports, and what it says of itself."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", LIBRARIES[name]],
            capture_output=True,
            text=True,
            timeout=LIBRARY_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check(name, "fail", f"importing it took more than {LIBRARY_LIMIT_S:.0f} s; is a driver hanging?")
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or [f"exit {answer.returncode}"])[-1]
        return Check(name, "fail", f"{last}; run make setup")
    return Check(name, "ok", answer.stdout.strip())


def check_disk(folder: Path) -> Check:
    """Whether there is room for results in `folder`."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    detail = f"{free / GIB:.1f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Check("disk", "fail", f"{place} cannot be written to; give another folder")
    if free < LEAST_DISK_BYTES:
        return Check("disk", "fail", f"{detail}; at least {LEAST_DISK_BYTES // GIB} GiB are needed")
    if free < ENOUGH_DISK_BYTES:
        return Check("disk", "warn", f"{detail}; enough for the demo, not for a real dataset")
    return Check("disk", "ok", detail)


def check_shm(place: Path = Path("/dev/shm")) -> Check:
    """Whether shared memory can hold Ray's object store."""
    if not place.is_dir():
        return Check("shm", "warn", f"no {place}: Ray's object store goes to the disk and is slow")
    size = shutil.disk_usage(place).total
    if size < ENOUGH_SHM_BYTES:
        return Check("shm", "warn", f"{size / GIB:.2f} GiB at {place}: give a container --shm-size=4g or more")
    return Check("shm", "ok", f"{size / GIB:.1f} GiB at {place}")


def check_compiler() -> Check:
    """Whether DeepSpeed could compile an op."""
    found = next((path for path in map(shutil.which, (os.environ.get("CXX", "c++"), "g++")) if path), None)
    if found is None:
        return Check("compiler", "warn", "no C++ compiler: DeepSpeed cannot build its optional ops; install g++")
    return Check("compiler", "ok", found)


def check_decode_child() -> Check:
    """Whether the kernel keeps a decode child from network, programs and files."""
    # Here, because numpy may be what is broken.
    from pipelines.data.decoding import Decoder
    from pipelines.errors import MediaError

    try:
        with Decoder() as decoder:
            found = decoder.isolation()
    except MediaError as error:
        return Check("decode child", "fail", f"it does not answer ({error}); look at PyAV above")
    if not all(found.values()):
        return Check("decode child", "warn", "the kernel has no seccomp filter for it: decode only files you trust")
    return Check("decode child", "ok", "no network, no programs, no files (seccomp)")


def check_token_file() -> Check:
    """Whether the token that `RAY_AUTH_TOKEN_PATH` names is there and private."""
    mode, given = os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given is None:
        return Check("ray token", "ok", f"RAY_AUTH_MODE={mode or 'unset'}, no token file named")
    path = Path(given).expanduser()
    if not path.is_file():
        return Check("ray token", "fail", f"RAY_AUTH_TOKEN_PATH={path} is not there; docs/operations.md makes one")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        return Check("ray token", "fail", f"{path} can be read by others; run chmod 600 {path}")
    if mode != "token":
        return Check("ray token", "fail", f"{path} is there but RAY_AUTH_MODE is {mode}; export RAY_AUTH_MODE=token")
    return Check("ray token", "ok", f"{path}, private")


def _status_of(url: str) -> int | None:
    """HTTP status of a plain GET without credentials or proxies; None when nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=PROBE_LIMIT_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


def check_jobs_api(dashboard: str) -> Check:
    """Whether a Ray cluster at `dashboard` runs jobs for anybody: its Jobs API must not answer without a token."""
    url = f"{dashboard.rstrip('/')}/api/jobs/"
    status = _status_of(url)
    if status is None:
        return Check("ray cluster", "ok", f"none at {dashboard}")
    if status in (401, 403):
        return Check("ray cluster", "ok", f"{dashboard} answers {status} without a token")
    if status == 200:
        return Check(
            "ray cluster",
            "fail",
            f"{url} answers without a token: anybody who reaches it runs code; restart it with RAY_AUTH_MODE=token",
        )
    return Check("ray cluster", "warn", f"{url} answers {status}; is that a Ray dashboard?")


def check_tracking(store: str) -> Check:
    """Whether the MLflow store can be reached."""
    shown = without_credentials(store)
    if store.startswith(("http://", "https://")):
        status = _status_of(f"{store.rstrip('/')}/health")
        if status is None:
            return Check("tracking", "fail", f"{shown} does not answer; runs stay in their journals until it does")
        # A proxy in front of the server may ask for a login; somebody is there.
        return Check("tracking", "ok" if status < 500 else "fail", f"{shown} answers {status}")
    if store.startswith("sqlite:///"):
        place = Path(store.removeprefix("sqlite:///")).absolute().parent
        above = next(path for path in (place, *place.parents) if path.exists())
        if not os.access(above, os.W_OK):
            return Check("tracking", "fail", f"{shown}: {above} cannot be written to")
    return Check("tracking", "ok", shown)


def all_checks(*, folder: Path, dashboard: str, store: str) -> list[Callable[[], Check]]:
    """Every check, in the order of the report, as something to call."""
    return [
        check_python,
        *(lambda name=name: check_library(name) for name in LIBRARIES),
        lambda: check_disk(folder),
        check_shm,
        check_compiler,
        check_decode_child,
        check_token_file,
        lambda: check_jobs_api(dashboard),
        lambda: check_tracking(store),
    ]
