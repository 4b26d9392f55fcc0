"""One writer a folder, on any storage and under any clock.

    lease/000001.json      made by a write that only succeeds where the name is free; its number is the fencing token
    lease/000002.json      whoever makes the next number has taken over; the one before sees it and stops

A holder rewrites its own file every few seconds with a higher count of renewals. Who wants to take over watches that
count by its own monotonic clock: it moves, and the folder is busy; it stands still, and the holder is gone, stopped or
cut off from storage. No wall clock and no time of a file is ever looked at, so skewed clocks cannot matter. A process
of this very machine that no longer lives is told at once, by its id and its start.

A stopped holder that wakes up finds the higher number in `check()`. Whoever commits what must not be committed twice
calls `check()` right before, and makes the commit itself conditional on the name being free.
"""

import getpass
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pipelines.data.storage import Folder
from pipelines.errors import EnvironmentFailed, PipelineError, StageConflict

LEASE_FOLDER = "lease"
RENEW_S = 5.0
MISSED_RENEWALS = 4
"""A holder that has not renewed for so many times its interval is taken to be gone."""
POLLS_PER_RENEWAL = 5
MAX_TRIES = 20
NEXT_STEP = "wait until it ends, stop it, or give another folder"


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a lease."""

    host: str
    boot_id: str
    """Of the running kernel; empty where the system has none to give."""
    pid_namespace: str
    """With the time namespace: in which of the machine's worlds `pid` and `start_ticks` count."""
    pid: int
    start_ticks: int
    """When the process started, in the kernel's ticks: tells it from a later one of the same id."""
    user: str
    command: str
    launch: str | None

    @property
    def is_known_dead(self) -> bool:
        """Whether it was a process of this very machine and namespace, and is no more; False where unknown."""
        here = (_boot_id(), _namespace())
        return all(here) and (self.boot_id, self.pid_namespace) == here and _is_gone(self.pid, self.start_ticks)

    def __str__(self) -> str:
        launch = f", launch {self.launch}" if self.launch else ""
        return f"'{self.command}' (host {self.host}, process {self.pid}, user {self.user}{launch})"


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What a lease file says."""

    owner: Owner
    renewals: int
    renew_s: float
    state: Literal["held", "released"]

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


class Lease:
    """The right to write a folder; a context manager that gives it back."""

    def __init__(self, folder: Folder, number: int, record: _Record, say: Callable[[str], None]) -> None:
        self.number = number
        """The fencing token: of two holders the one with the higher number counts."""
        self._folder = folder
        self._record = record
        self._say = say
        self._taken_by: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def is_lost(self) -> bool:
        """Whether somebody is known to have taken over; asks nobody."""
        return self._taken_by is not None

    def check(self) -> None:
        """Renew, then ask storage whether this is still the highest number.

        In this order, since a change in a folder makes an NFS client look at it anew.

        Raises:
            StageConflict: another process took over; what it writes stands.
            EnvironmentFailed: storage does not answer.
        """
        with self._lock:
            if self._taken_by is None:
                self._record = replace(self._record, renewals=self._record.renewals + 1)
                self._write()
                self._look()
        if self._taken_by is not None:
            raise StageConflict(
                f"{self._folder.uri} was taken over from lease {self.number} by {self._taken_by} while this process "
                "did not renew its own; what that one writes stands, run the same command again when it has ended"
            )

    def _look(self) -> None:
        highest = max(_numbers(self._folder), default=0)
        if highest > self.number:
            record = _parsed(_read(self._folder, highest))
            self._taken_by = str(record.owner) if record else f"the holder of {_name(highest)}"
            self._folder.delete(_name(self.number))

    def release(self) -> None:
        """Stop renewing and say so in the lease file, so that the next one need not wait."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.is_lost:
            return
        try:
            with self._lock:
                self._record = replace(self._record, state="released")
                self._write()
                self._look()
        except PipelineError as error:
            # Never in the place of what ended the block; the next one finds this process dead, or waits a little.
            self._say(f"lease {self.number} of {self._folder.uri} could not be given back: {error}")

    def _renew(self) -> None:
        while not self._stop.wait(self._record.renew_s):
            try:
                self.check()
            except StageConflict as error:
                self._say(str(error))
                return
            except PipelineError as error:
                # Storage may come back; until then the only risk is that somebody takes over, and `check` sees that.
                self._say(f"lease {self.number} of {self._folder.uri} could not be renewed: {error}")

    def _write(self) -> None:
        self._folder.write_bytes(_name(self.number), self._record.to_bytes())


def acquire(
    folder: Folder,
    say: Callable[[str], None] = print,
    *,
    launch: str | None = None,
    renew_s: float = RENEW_S,
) -> Lease:
    """The lease of a folder; enter it with `with`, which starts the renewals and ends in its release.

    Takes over at once what was released or what a dead process of this machine held; watches any other holder, for
    at most four of its renewal intervals.

    Args:
        folder: the folder to write.
        say: where lines about waiting and taking over go.
        launch: how the launch of this process is called, for whoever is refused.
        renew_s: seconds between renewals.

    Raises:
        StageConflict: somebody else holds it and is alive.
        EnvironmentFailed: storage fails, or ignores conditional writes.
    """
    record = _Record(owner=this_process(launch), renewals=0, renew_s=renew_s, state="held")
    for _ in range(MAX_TRIES):
        highest = max(_numbers(folder), default=0)
        if highest and not _await_end(folder, highest, renew_s, say):
            continue
        name = _name(highest + 1)
        try:
            folder.write_bytes(name, record.to_bytes(), only_if_absent=True)
        except FileExistsError:
            # Somebody was faster: look at that one.
            continue
        _require_conditional_writes(folder, name, record)
        for old in _numbers(folder):
            if old <= highest:
                folder.delete(_name(old))
        return Lease(folder, highest + 1, record, say)
    raise StageConflict(f"{folder.uri}: too many processes want to write it; {NEXT_STEP}")


def _await_end(folder: Folder, number: int, renew_s: float, say: Callable[[str], None]) -> bool:
    """Whether a lease may be taken over, after watching it if need be; False when a higher one is there meanwhile.

    Raises:
        StageConflict: its holder is alive.
    """
    first = _read(folder, number)
    record = _parsed(first)
    interval_s = max(renew_s, record.renew_s if record else 0.0)
    patience_s = MISSED_RENEWALS * interval_s
    started = time.monotonic()
    told = False
    while True:
        # Taken before the look: a watcher that is held up itself must not count that against the holder.
        looked = time.monotonic()
        if max(_numbers(folder), default=0) != number:
            return False
        seen = _read(folder, number)
        if seen is None:
            time.sleep(interval_s / POLLS_PER_RENEWAL)
            return False
        now = _parsed(seen)
        if now is not None and (now.state == "released" or now.owner.is_known_dead):
            return True
        if seen != first:
            holder = now.owner if now else f"the holder of {folder.uri}/{_name(number)}"
            raise StageConflict(f"{folder.uri} is being written by {holder}, which holds lease {number}; {NEXT_STEP}")
        if not told:
            holder = now.owner if now else "an unknown process"
            say(f"{folder.uri}: lease {number} is held by {holder}; watching for up to {patience_s:g} s if it lives")
            told = True
        if looked - started > patience_s:
            say(f"{folder.uri}: lease {number} was not renewed for {patience_s:g} s; taking over")
            return True
        time.sleep(interval_s / POLLS_PER_RENEWAL)


def _require_conditional_writes(folder: Folder, name: str, record: _Record) -> None:
    """A store that ignores the condition would let two writers in; better found here than in a mixed dataset."""
    if folder.is_local:
        return
    try:
        folder.write_bytes(name, record.to_bytes(), only_if_absent=True)
    except FileExistsError:
        return
    raise EnvironmentFailed(
        f"{folder.uri}: this storage ignores conditional writes (If-None-Match), so two jobs could write one folder "
        "at once; use a store that keeps them (AWS S3, MinIO, Ceph of today) or a mounted folder"
    )


def _name(number: int) -> str:
    return f"{LEASE_FOLDER}/{number:06d}.json"


def _numbers(folder: Folder) -> list[int]:
    stems = (name.removesuffix(".json") for name in folder.list_infos(LEASE_FOLDER) if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())


def _read(folder: Folder, number: int) -> bytes | None:
    """Content of a lease file; None once the holder of a higher one has removed it."""
    try:
        return folder.read_bytes(_name(number))
    except FileNotFoundError:
        return None


def _parsed(content: bytes | None) -> _Record | None:
    """None for what cannot be read as a lease: such a holder is watched like any other, by its bytes."""
    try:
        fields: dict[str, Any] = json.loads(content or b"")
        return _Record(**{**fields, "owner": Owner(**fields["owner"])})
    except (ValueError, TypeError, KeyError):
        return None


def this_process(launch: str | None = None) -> Owner:
    """Who this process is."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = str(os.getuid())
    return Owner(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=_namespace(),
        pid=os.getpid(),
        start_ticks=_start_ticks(os.getpid()) or 0,
        user=user,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        launch=launch,
    )


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    links = [Path(f"/proc/self/ns/{kind}") for kind in ("pid", "time")]
    try:
        # Start ticks are counted in the reader's time namespace, which old kernels do not have.
        return " ".join(str(link.readlink()) for link in links if link.is_symlink())
    except OSError:
        return ""


def _is_gone(pid: int, start_ticks: int) -> bool:
    """Whether no process of that id and start runs in this namespace."""
    found = _start_ticks(pid)
    if found is not None:
        return found != start_ticks
    try:
        # Other users' processes may be hidden in /proc, but not from a signal.
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _start_ticks(pid: int) -> int | None:
    """When a process started (field 22 of proc(5)'s stat), 0 for a zombie, None when it cannot be seen."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may hold anything; what follows its last one is plain.
    fields = text[text.rindex(")") + 2 :].split()
    return 0 if fields[0] in "ZX" else int(fields[19])
