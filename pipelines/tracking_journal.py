"""The journal of one tracked run: an append-only file that outlives every outage of the tracking server.

A journal is a folder, `journal.jsonl` with one record a line and `artifacts/` with the bytes that records refer to.
Writers append whole lines with one system call each, so a process killed at any moment leaves at most one torn line,
which the next writer seals. Readers look only at complete lines and remember their position in bytes.
Nothing here knows of MLflow, and nothing here can block on a network.
"""

import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"
ARTIFACTS = "artifacts"
CHILDREN = "children"
SHIPPED = "shipped.json"
HIDDEN = "<hidden>"
TAIL_BYTES = 4096
"""More than a closing record needs."""

_SECRET_NAME = re.compile(
    r"token|secret|passw|credential|api_?key|access_?key|private_?key|authorization", re.IGNORECASE
)
_URI_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_BAD_NAME = re.compile(r"[^\w.\- :/]", re.ASCII)

Record = dict[str, Any]


def without_credentials(text: str) -> str:
    """`scheme://user:password@host` -> `scheme://host`."""
    return _URI_CREDENTIALS.sub("", text)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters -> `{"optimizer.lr": "0.001"}`; lists as JSON; what looks like a secret is hidden."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{key}."))
        elif _SECRET_NAME.search(str(name)):
            flat[clean_name(key)] = HIDDEN
        elif isinstance(value, list | tuple):
            flat[clean_name(key)] = without_credentials(json.dumps(value, default=str))
        else:
            flat[clean_name(key)] = without_credentials(str(value))
    return flat


def clean_name(name: str) -> str:
    """A name that a tracking server accepts: other characters than letters, digits and `_-. :/` become `_`."""
    return _BAD_NAME.sub("_", name).strip("/")[:250]


def clean_path(name: str) -> str:
    """A relative artifact path without `..`, empty parts or odd characters."""
    parts = [re.sub(r"[^\w.\-+]", "_", part) for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or "unnamed"


@dataclass(frozen=True)
class Line:
    """One complete line: its record (None when it cannot be read) and the position after it."""

    record: Record | None
    end: int


def read_lines(folder: Path, start: int = 0) -> Iterator[Line]:
    """The complete lines from byte `start`; a torn last line waits until it is whole or sealed."""
    path = folder / JOURNAL
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(start)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            start += len(raw)
            yield Line(_parse(raw), start)


def is_closed(folder: Path) -> bool:
    """Whether the last record says that the run has ended; looks at the end of the file only."""
    path = folder / JOURNAL
    if not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    record = _parse(lines[-1]) if lines else None
    return record is not None and record["kind"] == "close"


def _parse(raw: bytes) -> Record | None:
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


class Journal:
    """The writing end; one process at a time."""

    def __init__(self, folder: Path) -> None:
        """Open or create the journal in `folder` and learn what an earlier attempt has already written."""
        self.folder = folder
        (folder / ARTIFACTS).mkdir(parents=True, exist_ok=True)
        self.first_open: Record | None = None
        """What the first attempt opened the run with; None for a new journal."""
        self.num_lost = 0
        """Artifacts that the disk did not take."""
        self._last_step: dict[str, int] = {}
        self._waiting: list[bytes] = []
        self._torn = self._learn()
        self._file = os.open(folder / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _learn(self) -> bool:
        end = 0
        for line in read_lines(self.folder):
            end = line.end
            record = line.record or {"kind": "unreadable"}
            if record["kind"] == "open" and self.first_open is None:
                self.first_open = record
            elif record["kind"] == "metrics":
                for key in record["values"]:
                    self._last_step[key] = max(record["step"], self._last_step.get(key, record["step"]))
        path = self.folder / JOURNAL
        return path.is_file() and path.stat().st_size > end

    @property
    def num_waiting(self) -> int:
        """Records that the disk did not take yet."""
        return len(self._waiting)

    def append(self, kind: str, **content: Any) -> None:
        """Write one record; if the disk refuses it, keep it and try again with the next one."""
        record = {"kind": kind, "at_ms": time.time_ns() // 1_000_000, **content}
        self._waiting.append(json.dumps(record).encode() + b"\n")
        try:
            while self._waiting:
                raw = b"\n" + self._waiting[0] if self._torn else self._waiting[0]
                self._torn = os.write(self._file, raw) < len(raw)
                if self._torn:
                    return
                self._waiting.pop(0)
        except OSError:
            # A full disk must cost no training step; close() tells how much is waiting.
            return

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values that are new: a step that an earlier attempt has journalled already is not doubled."""
        new: dict[str, float] = {}
        for name, value in values.items():
            key = clean_name(name)
            last = self._last_step.get(key)
            if last is None or step > last:
                new[key] = float(value)
                self._last_step[key] = step
        if new:
            self.append("metrics", step=step, values={k: v if math.isfinite(v) else str(v) for k, v in new.items()})

    def keep_bytes(self, artifact: str, content: bytes) -> None:
        """Keep `content` and record it as the run's artifact of that path."""
        artifact = clean_path(artifact)
        stored = f"{uuid.uuid4().hex}/{Path(artifact).name}"
        place = self.folder / ARTIFACTS / stored
        try:
            place.parent.mkdir()
            place.write_bytes(content)
        except OSError as error:
            # As for records: a full disk must cost no training step.
            self.append("lost", artifact=artifact, error=str(error))
            self.num_lost += 1
            return
        self.append("artifact", artifact=artifact, stored=stored)

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._file)
        os.close(self._file)


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """How far a journal has been shipped to one store."""

    run_id: str | None = None
    offset: int = 0
    """Bytes of the journal that the store has."""
    refused: int = 0
    """Records that the store called invalid; they are passed over."""
    error: str = ""
    """Why the last attempt did not get through; empty when it did."""


def load_shipped(folder: Path, store: str) -> Shipped:
    """The shipping state of the journal in `folder` for `store` (a URI); zero when nothing was shipped there."""
    path = folder / SHIPPED
    if not path.is_file():
        return Shipped()
    return Shipped(**json.loads(path.read_text()).get(without_credentials(store), {}))


def save_shipped(folder: Path, store: str, shipped: Shipped) -> None:
    """Record the shipping state; the file is replaced as a whole."""
    path = folder / SHIPPED
    states = json.loads(path.read_text()) if path.is_file() else {}
    states[without_credentials(store)] = asdict(shipped)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(states, indent=1) + "\n")
    temporary.replace(path)


def num_unshipped(folder: Path, store: str) -> int:
    """Complete records of the journal that `store` does not have yet."""
    return sum(1 for _ in read_lines(folder, load_shipped(folder, store).offset))


def register_child(launch: Path, child: Path, journal_id: str) -> None:
    """Tell the launch's shipper of a child's journal; doing it twice changes nothing."""
    place = launch / CHILDREN / f"{journal_id}.json"
    place.parent.mkdir(exist_ok=True)
    temporary = place.with_suffix(f".{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps({"folder": str(child)}))
    temporary.replace(place)


def children_of(launch: Path) -> list[Path]:
    """Journal folders of the launch's children, oldest registration first."""
    places = sorted((launch / CHILDREN).glob("*.json"), key=lambda place: place.stat().st_mtime_ns)
    return [Path(json.loads(place.read_text())["folder"]) for place in places]
