"""The metrics of every step, one JSON object a line, appended by rank 0 alone.

On resume the file is cut back to the step of the checkpoint, so that no step is ever lost or written twice. Trackers
read this file; training never waits for them.
"""

import json
import math
from pathlib import Path


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: a value that is not finite is written as null."""
    return value if math.isfinite(value) else None


def read_journal(path: Path) -> list[dict[str, float | int | None]]:
    """Return the whole records of a journal; a line cut off by a kill is left out. A missing file is empty."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class Journal:
    """Appends records to `path`, starting after `resume_step`: later records of an interrupted attempt are dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [record for record in read_journal(path) if _step_of(record) <= resume_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".jsonl.new")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """Write one record; `step` counts finished steps. It is on disk when this returns (not fsynced)."""
        record = {"step": step, **{name: finite_or_none(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; further appends fail."""
        self._file.close()


def _step_of(record: dict[str, float | int | None]) -> int:
    step = record["step"]
    return int(step) if step is not None else 0
