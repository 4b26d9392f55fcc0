"""The process that ships journals to MLflow, beside the work and never in its way; the only module with mlflow in it.

    python -m pipelines.tracking_ship launch JOURNAL PARENT_PID     while a launch runs, and until all is shipped
    python -m pipelines.tracking_ship replay FOLDER                 once, every journal below a folder

The store is `MLFLOW_TRACKING_URI`, which whoever starts this sets. Delivery is at least once and its effect exactly
once: the position is recorded after a batch is in the store, a batch sent twice has the same timestamps and MLflow
keeps one of two equal metrics, an artifact overwrites itself, and a run is found again by its journal's id before one
is created.
"""

import argparse
import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tracking_journal import (
    ARTIFACTS,
    JOURNAL,
    Record,
    children_of,
    is_closed,
    load_shipped,
    read_lines,
    save_shipped,
    without_credentials,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "multisoundgen"
JOURNAL_TAG = "multisoundgen.journal_id"
METRICS_A_BATCH = 500
NAMES_A_BATCH = 100
POLL_S = 0.5
LONGEST_WAIT_S = 30.0
LAST_TRIES = 4
"""Failures in a row after the launch has ended, before the shipper gives up (the journals stay)."""
DRAIN_LIMIT_S = 120.0
"""Longest time the shipper goes on after the launch has ended."""
NICENESS = 10
"""Shipping yields the CPU to the work that it reports on."""
INVALID = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
SHIPPER_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Our own loop retries, so one call must fail soon; nothing is sent anywhere but to the store."""


class Store:
    """One MLflow store: the client, the experiment, and the runs that are known."""

    def __init__(self, uri: str) -> None:
        """Connect lazily; nothing is contacted before the first run."""
        self.uri = uri
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self._runs: dict[str, str] = {}

    @property
    def client(self) -> "MlflowClient":
        """The client; a SQLite store is created (or migrated) by one process at a time."""
        if self._client is None:
            from mlflow import MlflowClient

            path = self._sqlite_path()
            with locked(path.with_name(f"{path.name}.lock"), wait=True) if path else contextlib.nullcontext():
                self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def _sqlite_path(self) -> Path | None:
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    def forget(self) -> None:
        """Drop what is remembered of the store: it may have been replaced by an empty one."""
        self._experiment_id = None
        self._runs.clear()

    def experiment_id(self) -> str:
        """Id of the experiment (`MLFLOW_EXPERIMENT_NAME` or ours), created at first use."""
        if self._experiment_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            found = self.client.get_experiment_by_name(name)
            if found is None:
                found = self._create_experiment(name)
            self._experiment_id = str(found.experiment_id)
        return self._experiment_id

    def _create_experiment(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        path = self._sqlite_path()
        # Without a server there is nobody to place artifacts; beside the database is where people look.
        place = (path.parent.absolute() / "mlflow_artifacts").as_uri() if path else None
        try:
            self.client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self.client.get_experiment_by_name(name)

    def find_run(self, journal_id: str) -> str | None:
        """Id of the run that carries a journal's id, None when there is none."""
        if journal_id not in self._runs:
            runs = self.client.search_runs(
                [self.experiment_id()], f"tags.`{JOURNAL_TAG}` = '{journal_id}'", max_results=1
            )
            if runs:
                self._runs[journal_id] = runs[0].info.run_id
        return self._runs.get(journal_id)

    def create_run(self, opened: Record, parent_id: str | None) -> str:
        """Create the run that an `open` record describes."""
        tags = {JOURNAL_TAG: opened["journal_id"], "multisoundgen.kind": opened["run_kind"]}
        if parent_id is not None:
            tags["mlflow.parentRunId"] = parent_id
        run = self.client.create_run(
            self.experiment_id(), start_time=opened["at_ms"], tags=tags, run_name=opened["name"]
        )
        self._runs[opened["journal_id"]] = run.info.run_id
        return run.info.run_id


class ParentNotThere(Exception):
    """The parent's run is not in the store yet; its own shipper brings it."""


class JournalShipper:
    """Ships one journal to one store, from where the last attempt ended."""

    def __init__(self, store: Store, folder: Path, *, orphan: bool) -> None:
        """`orphan`: create the run even when its parent's run cannot be found."""
        self._store = store
        self._folder = folder
        self._orphan = orphan
        self._state = load_shipped(folder, store.uri)

    def ship(self) -> None:
        """Ship every complete record; raises what the store raises, with the position kept."""
        from mlflow.exceptions import MlflowException

        try:
            self._ship()
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                # The store was emptied or replaced: the journal has everything, begin again.
                self._store.forget()
                self._save(run_id=None, offset=0)
            raise

    def finish(self, status: str) -> None:
        """Mark a run whose writer ended without closing it."""
        if self._state.run_id is not None and not is_closed(self._folder):
            self._store.client.set_terminated(self._state.run_id, status=status)

    def note(self, error: str) -> None:
        """Keep the reason of a failure where the end-of-run message finds it."""
        self._save(error=error)

    def _save(self, **changes: Any) -> None:
        changed = replace(self._state, **changes)
        if changed != self._state:
            self._state = changed
            save_shipped(self._folder, self._store.uri, changed)

    def _ship(self) -> None:
        metrics: list[Record] = []
        count, end = 0, self._state.offset
        for line in read_lines(self._folder, end):
            record = line.record
            if record is not None and record["kind"] == "metrics":
                metrics.append(record)
                count += len(record["values"])
            if count >= METRICS_A_BATCH or (metrics and (record is None or record["kind"] != "metrics")):
                self._metrics(metrics)
                at = line.end if record is not None and record["kind"] == "metrics" else end
                self._save(offset=at, error="")
                metrics, count = [], 0
            if record is not None and record["kind"] != "metrics":
                self._guarded(record)
            if not metrics:
                self._save(offset=line.end, error="")
            end = line.end
        if metrics:
            self._metrics(metrics)
            self._save(offset=end, error="")

    def _guarded(self, record: Record) -> None:
        """Handle one record; what the store calls invalid is counted and passed over."""
        from mlflow.exceptions import MlflowException

        if record["kind"] == "open":
            # Without a run nothing else can follow: this one must get through.
            self._open(record)
        try:
            self._handle(record)
        except MlflowException as error:
            if error.error_code not in INVALID:
                raise
            self._refuse(record, error)

    def _refuse(self, record: Record, error: Exception) -> None:
        sys.stderr.write(f"refused: {record['kind']}: {without_credentials(str(error))}\n")
        self._save(refused=self._state.refused + 1)

    def _handle(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "open":
            self._names(record["params"], tags=False)
            self._names(record["tags"], tags=True)
        elif kind == "tags":
            self._names(record["values"], tags=True)
        elif kind == "artifact":
            parent = str(Path(record["artifact"]).parent)
            local = self._folder / ARTIFACTS / record["stored"]
            self._store.client.log_artifact(self._run_id(), str(local), None if parent == "." else parent)
        elif kind == "close":
            self._store.client.set_terminated(self._run_id(), status=record["status"], end_time=record["at_ms"])

    def _open(self, record: Record) -> None:
        run_id = self._store.find_run(record["journal_id"])
        if run_id is None:
            run_id = self._store.create_run(record, self._parent_id(record))
        else:
            self._store.client.update_run(run_id, status="RUNNING")
        self._save(run_id=run_id)

    def _parent_id(self, record: Record) -> str | None:
        if record["parent"] is None:
            return None
        parent_id = self._store.find_run(record["parent"])
        if parent_id is None and not self._orphan:
            raise ParentNotThere(f"the run of launch {record['parent']} is not in the store yet")
        return parent_id

    def _names(self, values: dict[str, str], *, tags: bool) -> None:
        from mlflow.entities import Param, RunTag

        items = list(values.items())
        for start in range(0, len(items), NAMES_A_BATCH):
            part = items[start : start + NAMES_A_BATCH]
            self._store.client.log_batch(
                self._run_id(),
                params=[] if tags else [Param(key, value) for key, value in part],
                tags=[RunTag(key, value) for key, value in part] if tags else [],
            )

    def _metrics(self, records: list[Record]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        batch = [
            Metric(key, float(value), record["at_ms"], record["step"])
            for record in records
            for key, value in record["values"].items()
        ]
        try:
            for start in range(0, len(batch), METRICS_A_BATCH):
                self._store.client.log_batch(self._run_id(), metrics=batch[start : start + METRICS_A_BATCH])
        except MlflowException as error:
            if error.error_code not in INVALID:
                raise
            if len(records) == 1:
                self._refuse(records[0], error)
                return
            for record in records:
                self._metrics([record])

    def _run_id(self) -> str:
        if self._state.run_id is None:
            raise ParentNotThere("the journal's first record could not be read: no run to log to")
        return self._state.run_id


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on `path` inside the block; yields whether it was got."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def ship_journal(store: Store, folder: Path, *, orphan: bool, status_if_open: str | None) -> str:
    """Ship one journal as far as it goes now; returns why it did not get through, or an empty text."""
    with locked(folder / "ship.lock", wait=False) as mine:
        if not mine:
            return "another process is shipping this journal"
        shipper = JournalShipper(store, folder, orphan=orphan)
        try:
            shipper.ship()
            if status_if_open is not None:
                shipper.finish(status_if_open)
        except Exception as error:
            # Whatever the store, the network or the database says: the journal keeps the records.
            reason = without_credentials(" ".join(str(error).split()))[:300] or type(error).__name__
            shipper.note(reason)
            return reason
    return ""


def has_ended(launch: Path, parent_pid: int) -> bool:
    """Whether the launch was closed by its present attempt, or its process is gone."""
    return os.getppid() != parent_pid or is_closed(launch)


def follow_launch(store: Store, launch: Path, parent_pid: int) -> int:
    """Ship a launch and its children while it runs and until it is all there; 0 when it is, 1 when giving up."""
    failures, ended_at = 0, None
    while True:
        if ended_at is None and has_ended(launch, parent_pid):
            ended_at, failures = time.monotonic(), 0
        ended = ended_at is not None
        status = "KILLED" if ended else None
        journals = [launch, *(child for child in children_of(launch) if child.is_dir())]
        reasons = [ship_journal(store, journal, orphan=ended, status_if_open=status) for journal in journals]
        failures = failures + 1 if any(reasons) else 0
        if ended_at is not None:
            if not failures:
                return 0
            if failures >= LAST_TRIES or time.monotonic() - ended_at > DRAIN_LIMIT_S:
                return 1
        wait_until = time.monotonic() + (min(LONGEST_WAIT_S, 2.0 ** (failures - 1)) if failures else POLL_S)
        while time.monotonic() < wait_until and (ended or not has_ended(launch, parent_pid)):
            time.sleep(POLL_S)


def replay(store: Store, root: Path) -> int:
    """Ship every journal below `root` once, launches first; 0 when all is there."""
    folders = [path.parent for path in root.rglob(JOURNAL)]
    folders.sort(key=lambda folder: (folder.name != "launch", str(folder)))
    failed = 0
    for folder in folders:
        reason = ship_journal(store, folder, orphan=True, status_if_open=None)
        if reason:
            failed += 1
            sys.stderr.write(f"{folder}: {reason}\n")
    return 1 if failed else 0


def main() -> int:
    """Parse the command line of the shipper process and do it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("mode", choices=("launch", "replay"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("parent_pid", type=int, nargs="?", default=0)
    given = parser.parse_args()
    for name, value in SHIPPER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.nice(NICENESS)
    store = Store(os.environ["MLFLOW_TRACKING_URI"])
    if given.mode == "replay":
        return replay(store, given.folder)
    return follow_launch(store, given.folder, given.parent_pid)


if __name__ == "__main__":
    sys.exit(main())
