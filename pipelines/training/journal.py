"""The metrics of every step, one JSON object a line, appended by rank 0 alone.

On resume the file is cut back to the step of the checkpoint, so that no step is ever lost or written twice. Trackers
read this file; training never waits for them.
"""

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.local_files import read_pieces, write_pieces
from pipelines.data.storage import open_folder
from pipelines.data.storage_faults import local_failure

Record = dict[str, float | int | None]


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: a value that is not finite is written as null."""
    return value if math.isfinite(value) else None


def read_journal(path: Path) -> list[Record]:
    """Return the whole records of a journal; a line cut off by a kill is left out. A missing file is empty."""
    return parse_journal(path.read_bytes()) if path.exists() else []


def parse_journal(content: bytes) -> list[Record]:
    """Return the whole records of a journal's content."""
    lines = content.decode("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


@dataclass(frozen=True)
class JournalCut:
    """A journal up to a moment; what is appended later is not in it."""

    path: Path
    size_bytes: int

    def copy_to(self, target: Path) -> None:
        """Copy it; raises EnvironmentFailed where that cannot be written."""
        write_pieces(target, read_pieces(str(self.path), 0, self.size_bytes))


class Journal:
    """Appends records to `path`, starting after `resume_step`: later records of an interrupted attempt are dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Cut the file back; raises EnvironmentFailed where it cannot be written."""
        self._path = path
        kept = [record for record in read_journal(path) if _step_of(record) <= resume_step]
        content = "".join(json.dumps(record) + "\n" for record in kept)
        open_folder(path.parent).write_bytes(path.name, content.encode())
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """Write one record; `step` counts finished steps. It is on disk when this returns (not fsynced).

        Raises:
            EnvironmentFailed: the disk is full, read-only or gone.
        """
        record = {"step": step, **{name: finite_or_none(value) for name, value in metrics.items()}}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise local_failure(error, self._path) from error

    def cut(self) -> JournalCut:
        """Return the journal as it is now."""
        return JournalCut(self._path, self._path.stat().st_size)

    def close(self) -> None:
        """Close the file; further appends fail."""
        with suppress(OSError):
            # What a full disk did not take was told by `append`, and is still in the file's buffer.
            self._file.close()


def _step_of(record: Record) -> int:
    step = record["step"]
    return int(step) if step is not None else 0
