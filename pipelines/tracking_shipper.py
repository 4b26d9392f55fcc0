"""Where the journals of a launch go, and the background process that brings them there (`tracking_ship`)."""

import os
import subprocess
import sys
from pathlib import Path

from pipelines.tracking_journal import children_of, load_shipped, num_unshipped, without_credentials

URI_VARIABLE = "MLFLOW_TRACKING_URI"
EXIT_LIMIT_S = 240.0
"""Longest wait for the shipper at the end of a launch; it gives up by itself well before."""
PATIENCE_S = 10.0


def default_store(out: str) -> str:
    """The tracking URI: `MLFLOW_TRACKING_URI`, else `mlflow.db` in the nearest folder above `out` called `runs`.

    Without such a folder it lies beside `out`; for an object store in this user's cache folder.
    """
    given = os.environ.get(URI_VARIABLE)
    if given:
        return given
    if "://" in out:
        return f"sqlite:///{Path.home() / '.cache' / 'multisoundgen' / 'mlflow.db'}"
    path = Path(out).absolute()
    place = next((parent for parent in path.parents if parent.name == "runs"), path.parent)
    return f"sqlite:///{place / 'mlflow.db'}"


def ship_below(folder: Path) -> bool:
    """Ship every journal below a folder once, now; returns whether all of them are whole in their store."""
    process = _start_shipper("replay", folder, store=default_store(str(folder / "journal")))
    return process.wait() == 0


class Shipper:
    """The background process that ships a launch's journals."""

    def __init__(self, folder: Path, store: str) -> None:
        self._folder = folder
        self._store = store
        self._process = _start_shipper("launch", folder, store=store, parent_pid=os.getpid())

    def finish(self) -> None:
        """Wait until all is shipped or the shipper gives up, then tell people in a line where it is."""
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            sys.stderr.write(f"tracking: still shipping to {without_credentials(self._store)} ...\n")
            try:
                self._process.wait(EXIT_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        sys.stderr.write(self.summary() + "\n")

    def summary(self) -> str:
        """One line: where the runs are, or how much is still unshipped, why, and what to do."""
        journals = [self._folder, *children_of(self._folder)]
        waiting = sum(num_unshipped(journal, self._store) for journal in journals)
        states = [load_shipped(journal, self._store) for journal in journals]
        shown = without_credentials(self._store)
        refused = sum(state.refused for state in states)
        note = f"; {refused} records were refused as invalid, see {self._folder}/ship.log" if refused else ""
        if waiting:
            reason = next((state.error for state in states if state.error), "the shipper did not get to it")
            return (
                f"tracking: {waiting} records could not be shipped to {shown} ({reason}); nothing is lost, they are in "
                f"{self._folder}: run `python jobs/doctor.py --ship {self._folder.parent.parent}` when it is back{note}"
            )
        look = f"; look with: mlflow ui --backend-store-uri {shown}" if shown.startswith("sqlite:") else ""
        return f"tracking: all records are in {shown}{look}{note}"


def _start_shipper(mode: str, folder: Path, *, store: str, parent_pid: int = 0) -> subprocess.Popen[bytes]:
    """Start `pipelines.tracking_ship`; the store's URI goes through the environment, since it may hold a password."""
    root = str(Path(__file__).resolve().parents[1])
    search = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    environment = {**os.environ, "PYTHONPATH": search, URI_VARIABLE: os.environ.get(URI_VARIABLE) or store}
    command = [sys.executable, "-m", "pipelines.tracking_ship", mode, str(folder), str(parent_pid)]
    if mode == "replay":
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    with (folder / "ship.log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
