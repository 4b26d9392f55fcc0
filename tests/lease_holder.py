"""A process that takes a folder's lease and does what it is told: python -m tests.lease_holder FOLDER RENEW_S SHIFT_S.

It writes `held N` or `refused: why`, then obeys lines: `check`, `commit NAME` (a manifest of that content), `release`.
SHIFT_S is how wrong its wall clock goes.
"""

import os
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

from pipelines.data.lease import acquire
from pipelines.data.storage import open_folder
from pipelines.errors import StageConflict


def main(location: str, renew_s: float, shift_s: float) -> None:
    right_time, right_time_ns = time.time, time.time_ns
    time.time = lambda: right_time() + shift_s
    time.time_ns = lambda: right_time_ns() + round(shift_s * 1e9)
    folder = open_folder(location)
    try:
        with acquire(folder, lambda line: None, renew_s=renew_s, launch="spring-corpus") as lease:
            tell(f"held {lease.number}")
            for line in sys.stdin:
                command, _, argument = line.strip().partition(" ")
                if command == "release":
                    break
                try:
                    lease.check()
                    if command == "commit":
                        folder.write_bytes("manifest.json", argument.encode(), only_if_absent=True)
                    tell("done")
                except StageConflict as error:
                    tell(f"conflict: {error}")
    except StageConflict as error:
        tell(f"refused: {error}")
    tell("ended")


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Holder:
    """Such a process, seen from a test."""

    def __init__(self, location: str, renew_s: float, *, shift_s: float = 0.0, prefix: tuple[str, ...] = ()) -> None:
        command = [sys.executable, "-m", "tests.lease_holder", location, str(renew_s), str(shift_s)]
        self.process = subprocess.Popen(
            [*prefix, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )

    def ask(self, line: str) -> str:
        """Its answer to a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None and not stream.closed:
                stream.close()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
