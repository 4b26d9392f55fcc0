"""The model as it is before step 0, made once and kept in the training's folder until that is finished."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from pipelines.data.scratch import scratch_folder
from pipelines.data.storage import Folder, open_folder
from pipelines.data.storage_faults import weights_failure
from pipelines.data.store import CHECKPOINT, MANIFEST, STORE_VERSION, files_manifest

START = "start"


def made_once(folder: Folder, make: Callable[[Path], None]) -> str:
    """Path or URI of the start; `make` writes it to a folder where it is not there yet, whole or not at all.

    On a mounted folder that is a rename. In an object store it is an artifact of its own with a manifest, from which
    every worker makes its copy (`store.local_folder`).

    Raises:
        EnvironmentFailed: the disk is full, read-only or gone, or storage fails after retries.
    """
    try:
        if folder.is_local:
            _make_mounted(folder.local_path(START), make)
        elif not folder.exists(f"{START}/{MANIFEST}"):
            _make_remote(open_folder(f"{folder.uri}/{START}"), make)
    except (OSError, SafetensorError) as error:
        raise weights_failure(error, f"{folder.uri}/{START}") from error
    return f"{folder.uri}/{START}"


def _make_mounted(start: Path, make: Callable[[Path], None]) -> None:
    if start.exists():
        return
    pending = start.with_name(start.name + ".new")
    shutil.rmtree(pending, ignore_errors=True)
    make(pending)
    pending.rename(start)


def _make_remote(start: Folder, make: Callable[[Path], None]) -> None:
    with scratch_folder() as scratch:
        make(scratch)
        names = sorted(path.name for path in scratch.iterdir())
        for name in names:
            with start.new_file(name) as pending:
                (scratch / name).replace(pending)
    manifest = {"store_version": STORE_VERSION, "kind": CHECKPOINT, "files": files_manifest(start, names)}
    start.write_bytes(MANIFEST, json.dumps(manifest, indent=1).encode())
