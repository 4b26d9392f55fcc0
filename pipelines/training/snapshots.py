"""Checkpoints of a running training: a step waits for the copy to host memory, a thread of each rank does the rest.

No rank talks to another in its thread. Each writes its own files, brings them to the disk, hashes them and publishes a
receipt; rank 0's thread publishes `COMPLETE` once the receipts of all ranks of this attempt lie there. At most one
checkpoint is under way; what went wrong with it is raised at the next one, or at the end.
"""

import json
import threading
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from models.ema import WeightAverage
from models.weights import load_weights, save_weights
from pipelines.errors import EnvironmentFailed
from pipelines.training import checkpoints
from pipelines.training.engine import Engine
from pipelines.training.fragments import HostCopy
from pipelines.training.options import TrainingOptions
from pipelines.training.world import World

STATE = "training.json"
AVERAGE = "average.safetensors"
POLL_S = 0.05
RECEIPT_LIMIT_S = 1800.0
"""How long rank 0 waits for the files of the others; a rank that died ends the training well before."""
FAREWELL_S = 20.0
"""How long a training that fails waits for the checkpoint under way."""


class Snapshots:
    """Saves and loads; every rank makes the same calls in the same order."""

    def __init__(self, root: Path, world: World, engine: Engine, options: TrainingOptions) -> None:
        self._root, self._world, self._engine, self._options = root, world, engine, options
        self._thread: threading.Thread | None = None
        self._failure: EnvironmentFailed | None = None
        self._leave = threading.Event()

    def save(self, state: dict[str, Any], average: WeightAverage | None, metric: float | None) -> None:
        """Begin the checkpoint of step `state["step"]`; returns when all of it is in host memory.

        `metric`: the validation loss, lower is better, or None.

        Raises:
            EnvironmentFailed: the checkpoint before could not be written.
        """
        self.wait()
        step = int(state["step"])
        name = self._world.share(checkpoints.folder_name(self._root, step) if self._world.is_main else "")
        self._world.average_buffers(self._engine.trainee)
        weights = self._engine.host_copy()
        text, shadows = "", None
        if self._world.is_main:
            text = json.dumps(state, indent=1)
            if average is not None:
                shadows = {f"{i:06d}": s.detach().to("cpu", copy=True) for i, s in enumerate(average.shadows)}

        def write() -> None:
            try:
                self._write(self._root / name, step, weights, text, shadows, metric)
            except (OSError, SafetensorError) as error:
                self._failure = EnvironmentFailed(
                    f"{self._root}: the checkpoint of step {step} cannot be written "
                    f"({str(error).splitlines()[0]}); free the storage and run the same command again"
                )

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when no checkpoint is under way; raises EnvironmentFailed if the last one could not be written."""
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

        Any number of ranks and any ZeRO stage may have written it.

        Raises:
            InputError: it is of another model.
        """
        self._engine.load([found.path / name for name in sorted(found.files) if checkpoints.is_weights(name)])
        state: dict[str, Any] = json.loads((found.path / STATE).read_text(encoding="utf-8"))
        if average is not None:
            shadows = load_weights(found.path / AVERAGE)
            average.load_state_dict(
                {"num_updates": state["num_average_updates"], "shadows": [shadows[name] for name in sorted(shadows)]}
            )
        return state

    def _write(
        self,
        folder: Path,
        step: int,
        weights: HostCopy,
        text: str,
        shadows: dict[str, Tensor] | None,
        metric: float | None,
    ) -> None:
        rank, size = self._world.rank, self._world.size
        try:
            names = [checkpoints.weights_name(rank, size)]
            weights.write(folder / names[0])
            if rank == 0:
                (folder / STATE).write_text(text, encoding="utf-8")
                names.append(STATE)
                if shadows is not None:
                    save_weights(folder / AVERAGE, shadows)
                    names.append(AVERAGE)
                for name in names[1:]:
                    checkpoints.sync(folder / name)
            files = checkpoints.digest_files(folder, names)
        except (OSError, SafetensorError) as error:
            checkpoints.publish_receipt(folder, rank, {}, error=str(error))
            raise OSError(f"rank {rank}: {error}") from error
        checkpoints.publish_receipt(folder, rank, files, error=None)
        if rank == 0:
            self._complete(folder, step, metric)

    def _complete(self, folder: Path, step: int, metric: float | None) -> None:
        files: dict[str, dict[str, Any]] = {}
        waited_s = 0.0
        for rank in range(self._world.size):
            while (part := checkpoints.read_receipt(folder, rank)) is None:
                if self._leave.wait(POLL_S):
                    return
                waited_s += POLL_S
                if waited_s > RECEIPT_LIMIT_S:
                    raise OSError(f"rank {rank} did not write its share in {RECEIPT_LIMIT_S:.0f} s")
            files |= part
        checkpoints.publish(folder, step=step, world_size=self._world.size, metric=metric, files=files)
        checkpoints.retain(self._root, self._options.keep_last, self._options.keep_every)
