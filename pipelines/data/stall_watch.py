"""Kills a worker that makes no progress: stopped, deadlocked or lost in a call that never returns.

Ray notices a process that is gone, and never one that hangs. A small process beside each worker waits for a sign of
life after every row; where none comes in time it kills the worker, which Ray then replaces. It runs as a program of its
own, because a stopped or blocked worker cannot watch itself.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
BEAT = b"."
REST = b"-"


class StallWatch:
    """Watches this process between a `beat` and the next `rest`; end it with `close`."""

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: longest time from a `beat()` to the next sign of life before this process is killed."""
        self._watcher = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipelines.data.stall_watch", str(os.getpid()), str(limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd="/",
            env={"PYTHONPATH": str(PROJECT)},
            start_new_session=True,
            bufsize=0,
        )

    def beat(self) -> None:
        """Tell that work goes on."""
        self._tell(BEAT)

    def rest(self) -> None:
        """Tell that there is nothing to do, for however long."""
        self._tell(REST)

    def _tell(self, what: bytes) -> None:
        if self._watcher.stdin is not None:
            # A watcher that was killed must not take the worker with it.
            with contextlib.suppress(OSError):
                self._watcher.stdin.write(what)

    def close(self) -> None:
        """Stop watching."""
        if self._watcher.stdin is not None:
            with contextlib.suppress(OSError):
                self._watcher.stdin.close()
        self._watcher.wait()


def watch(worker_pid: int, limit_s: float, signs: int) -> bool:
    """Wait for signs of life on a file descriptor; kill the worker where none follows a beat in time.

    Ends without killing when the other end is closed, that is when the worker is gone or has said goodbye.

    Returns whether the worker was killed.
    """
    limit: float | None = None
    while True:
        if not select.select([signs], [], [], limit)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker_pid, signal.SIGKILL)
            return True
        sign = os.read(signs, 4096)
        if not sign:
            return False
        limit = None if sign.endswith(REST) else limit_s


if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]), sys.stdin.fileno())
