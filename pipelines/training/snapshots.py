"""Checkpoints of a running training: a step waits for the copy to host memory, a thread of each rank does the rest.

No rank talks to another in its thread. Each writes its own files, brings them to the storage and publishes a receipt;
rank 0's thread publishes `COMPLETE` once the receipts of all ranks of this attempt lie there. At most one checkpoint is
under way; what went wrong with it is raised at the next one, or at the end.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from models.ema import WeightAverage
from models.weights import load_weights
from pipelines.data.storage import Folder, open_folder
from pipelines.data.storage_faults import weights_failure
from pipelines.errors import EnvironmentFailed, PipelineError, first_line
from pipelines.training import checkpoints
from pipelines.training.engine import Engine
from pipelines.training.journal import JournalCut
from pipelines.training.options import TrainingOptions
from pipelines.training.workplace import JOURNAL
from pipelines.training.world import World

STATE = "training.json"
AVERAGE = "average.safetensors"
AGAIN = "run the same command again"
POLL_S, REMOTE_POLL_S = 0.05, 1.0
"""Between two looks for a receipt, on a mounted folder and in an object store."""
RECEIPT_LIMIT_S = 1800.0
"""How long rank 0 waits for the files of the others; a rank that died ends the training well before."""
FAREWELL_S = 20.0
"""How long a training that fails waits for the checkpoint under way."""


class Snapshots:
    """Saves and loads; every rank makes the same calls in the same order."""

    def __init__(self, root: Folder, world: World, engine: Engine, options: TrainingOptions) -> None:
        self._root, self._world, self._engine, self._options = root, world, engine, options
        self._thread: threading.Thread | None = None
        self._failure: PipelineError | None = None
        self._leave = threading.Event()

    def save(
        self,
        state: dict[str, Any],
        average: WeightAverage | None,
        metric: float | None,
        journal: JournalCut | None = None,
    ) -> None:
        """Begin the checkpoint of step `state["step"]`; returns when all of it is in host memory.

        Args:
            state: JSON values to come back from `load`.
            average: averaged weights, if there are any.
            metric: the validation loss, lower is better, or None.
            journal: what is to travel with the checkpoint, on rank 0, where the journal does not lie beside it.

        Raises:
            EnvironmentFailed: the checkpoint before could not be written.
            InputError: the same, since the storage refuses.
        """
        self.wait()
        step = int(state["step"])
        name = self._world.share(checkpoints.folder_name(self._root, step) if self._world.is_main else "")
        self._world.average_buffers(self._engine.trainee)
        weights = self._engine.host_copy()
        writers: dict[str, Callable[[Path], None]] = {
            checkpoints.weights_name(self._world.rank, self._world.size): weights.write
        }
        if self._world.is_main:
            text = json.dumps(state, indent=1)
            writers[STATE] = lambda path: _write_text(path, text)
            if average is not None:
                shadows = {
                    f"{i:06d}": s.detach().to("cpu", copy=True).contiguous() for i, s in enumerate(average.shadows)
                }
                writers[AVERAGE] = lambda path: save_file(shadows, path)
            if journal is not None:
                writers[JOURNAL] = journal.copy_to

        def write() -> None:
            try:
                self._write(open_folder(f"{self._root.uri}/{name}"), step, writers, metric)
            except (OSError, PipelineError) as error:
                kind = type(error) if isinstance(error, PipelineError) else EnvironmentFailed
                reason = first_line(error)
                # What another rank's storage said in its receipt says so itself.
                again = "" if AGAIN in reason else f"; free the storage and {AGAIN}"
                self._failure = kind(
                    f"{self._root.uri}: the checkpoint of step {step} cannot be written ({reason}){again}"
                )

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when no checkpoint is under way; raises as `save` if the last one could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Let the checkpoint under way come to its end, without waiting long for other ranks, and without an error."""
        if self._thread is not None:
            self._thread.join(timeout=FAREWELL_S)
            self._leave.set()
            self._thread.join()
            self._thread = None

    def load(self, found: checkpoints.Checkpoint, average: WeightAverage | None) -> dict[str, Any]:
        """Restore weights, optimizer, buffers and the average; returns the state that `save` was given.

        Any number of ranks and any ZeRO stage may have written it. Rank 0 has found, and so fetched, it.

        Raises:
            InputError: it is of another model.
        """
        if not self._world.is_main:
            found.fetch(trusting=True)
        self._engine.load([found.path / name for name in sorted(found.files) if checkpoints.is_weights(name)])
        state: dict[str, Any] = json.loads((found.path / STATE).read_text(encoding="utf-8"))
        if average is not None:
            shadows = load_weights(found.path / AVERAGE)
            average.load_state_dict(
                {"num_updates": state["num_average_updates"], "shadows": [shadows[name] for name in sorted(shadows)]}
            )
        return state

    def _write(
        self, folder: Folder, step: int, writers: dict[str, Callable[[Path], None]], metric: float | None
    ) -> None:
        rank = self._world.rank
        try:
            files = {name: _put(folder, name, write) for name, write in writers.items()}
        except (OSError, PipelineError) as error:
            checkpoints.publish_receipt(folder, rank, {}, error=str(error))
            kind = type(error) if isinstance(error, PipelineError) else OSError
            raise kind(f"rank {rank}: {error}") from error
        checkpoints.publish_receipt(folder, rank, files, error=None)
        if rank == 0:
            self._complete(folder, step, metric)

    def _complete(self, folder: Folder, step: int, metric: float | None) -> None:
        files: dict[str, dict[str, Any]] = {}
        waited_s, poll_s = 0.0, POLL_S if folder.is_local else REMOTE_POLL_S
        for rank in range(self._world.size):
            while (part := checkpoints.read_receipt(folder, rank)) is None:
                if self._leave.wait(poll_s):
                    return
                waited_s += poll_s
                if waited_s > RECEIPT_LIMIT_S:
                    raise OSError(f"rank {rank} did not write its share in {RECEIPT_LIMIT_S:.0f} s")
            files |= part
        checkpoints.publish(folder, step=step, world_size=self._world.size, metric=metric, files=files)
        checkpoints.retain(self._root, self._options.keep_last, self._options.keep_every)


def _put(folder: Folder, name: str, write: Callable[[Path], None]) -> dict[str, Any]:
    """Write one file; returns its size and sha256, taken before it leaves this machine."""
    with folder.new_file(name) as path:
        try:
            write(path)
        except SafetensorError as error:
            raise weights_failure(error, f"{folder.uri}/{name}") from error
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size_bytes": path.stat().st_size, "sha256": sha256}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
