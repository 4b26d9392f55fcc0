"""A small disk of its own for a test: a tmpfs in a new mount namespace, reached through /proc/<pid>/root."""

import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


class SmallDisk:
    """A context that mounts a tmpfs with some options (`size=1m`, `nr_inodes=20`); the test is skipped where it cannot.

    The mount is seen by this context's shell alone, and goes when that ends.
    """

    def __init__(self, folder: Path, options: str) -> None:
        self._folder = folder
        self._options = options

    def __enter__(self) -> Self:
        if shutil.which("unshare") is None:
            pytest.skip("there is no unshare(1) to make a mount namespace with")
        self._folder.mkdir()
        self._shell = subprocess.Popen(
            [*NAMESPACE, "sh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        answer = self._do(f"mount -t tmpfs -o {self._options} none '{self._folder}'")
        if answer != "0":
            self.__exit__(None, None, None)
            pytest.skip(f"no file system may be mounted here: {answer}")
        return self

    @property
    def path(self) -> Path:
        """The disk's root, as this process and those it starts see it."""
        return Path(f"/proc/{self._shell.pid}/root{self._folder}")

    def remount(self, options: str) -> None:
        """Give the disk other options, such as a larger size or `ro`."""
        assert self._do(f"mount -o remount,{options} '{self._folder}'") == "0"

    def _do(self, command: str) -> str:
        """What a command in the shell says, or else its exit code."""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        try:
            self._shell.stdin.write(f"{command}; echo $?\n")
            self._shell.stdin.flush()
        except BrokenPipeError:
            return "the namespace could not be made"
        return self._shell.stdout.readline().strip()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shell.kill()
        self._shell.wait()
        for stream in (self._shell.stdin, self._shell.stdout):
            if stream is not None:
                stream.close()
