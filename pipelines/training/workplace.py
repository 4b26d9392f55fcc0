"""Where a training's rank 0 keeps the journal and writes what it exports: files that need a path.

On a mounted folder that is the training's own folder. An object store has no appending, so there it is a scratch
folder: the journal travels with every checkpoint, and journal and export are published at the end.
"""

import shutil
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError

from pipelines.data.scratch import scratch_folder
from pipelines.data.storage import open_folder
from pipelines.data.storage_faults import weights_failure
from pipelines.training.objective import Exported, Objective, Trainee

JOURNAL = "metrics.jsonl"


class Workplace:
    """Close it when done; what was not published is then gone."""

    def __init__(self, out: str) -> None:
        """`out`: the training's folder, a path or a URI."""
        self.folder = open_folder(out)
        self._stack = ExitStack()
        is_local = self.folder.is_local
        self.path: Path = self.folder.local_path() if is_local else self._stack.enter_context(scratch_folder())

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.path / JOURNAL

    @property
    def is_scratch(self) -> bool:
        """Whether what is written here has to be published."""
        return not self.folder.is_local

    def take_journal(self, folder: Path) -> None:
        """Go on with the journal that lies in a checkpoint."""
        shutil.copyfile(folder / JOURNAL, self.journal)

    def export(self, objective: Objective, trainee: Trainee) -> Exported:
        """Have what the next stage loads in the training's folder, and with it the journal.

        Raises:
            EnvironmentFailed: the disk is full, read-only or gone, or storage fails after retries.
            InputError: storage refuses.
        """
        try:
            exported = objective.export(trainee, self.path)
        except (OSError, SafetensorError) as error:
            raise weights_failure(error, self.path) from error
        if self.is_scratch:
            for name in [*exported.files, JOURNAL]:
                with self.folder.new_file(name) as pending:
                    (self.path / name).replace(pending)
        return exported

    def close(self) -> None:
        """Delete a scratch."""
        self._stack.close()
