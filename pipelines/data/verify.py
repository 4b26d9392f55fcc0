"""Is a finished artifact still what it says? Every file against the manifest, and random rows against their sources."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.clip_worker import ClipWorker
from pipelines.data.contracts import FEATURES, Contract
from pipelines.data.planned_units import find_planned
from pipelines.data.preprocess import find_networks, planned_rows
from pipelines.data.preprocess_settings import METHOD, STAGE, PreprocessSettings
from pipelines.data.storage import Folder, open_folder
from pipelines.data.store import MANIFEST, Dataset, read_manifest
from pipelines.data.tables import column_to_numpy
from pipelines.data.units import Unit
from pipelines.devices import own_device
from pipelines.errors import InputError

TOLERANCE = 2e-2
"""Largest |difference| of an encoder's or codec's value that another kind of processor may cause, in parts of the
largest value of its tensor; the same processor gives the same bits."""
LISTED = ("data", "rejects")


@dataclass(frozen=True, kw_only=True)
class RowCheck:
    """One row against what its source gives now."""

    clip_id: str
    outcome: str
    """`equal`, `close` (within the tolerance), `differs`, or `gone` (the source cannot be used any more)."""
    detail: str = ""


def check_files(location: str) -> list[str]:
    """What is wrong with the files of a finished artifact, a line each: missing, altered, or not in the manifest.

    Raises:
        InputError: nothing is there, or it is not finished.
    """
    manifest = read_manifest(location)
    folder = open_folder(location)
    entries = [entry for group in ("files", "parts", "rejects") for entry in manifest.get(group, ())]
    problems = [problem for entry in entries if (problem := _file_problem(folder, entry))]
    listed = {entry["path"] for entry in entries}
    for sub in LISTED if manifest.get("kind") == "dataset" else ():
        names = [f"{sub}/{name}" for name in folder.list_names(sub)]
        problems += [f"{name}: not in {MANIFEST}; no reader sees it" for name in names if name not in listed]
    return problems


def _file_problem(folder: Folder, entry: Mapping[str, Any]) -> str | None:
    size = folder.size_bytes(entry["path"])
    if size is None:
        return f"{entry['path']}: missing"
    if "bytes" in entry and size != entry["bytes"]:
        return f"{entry['path']}: {size} bytes, the manifest says {entry['bytes']}"
    if folder.sha256(entry["path"]) != entry["sha256"]:
        return f"{entry['path']}: its sha256 is not the manifest's"
    return None


def check_rows(location: str, *, count: int, seed: int, weights: str | None = None) -> list[RowCheck]:
    """Make `count` random rows of a features dataset again, from their sources, and compare every value.

    Args:
        location: the dataset that preprocess made.
        count: rows to draw; all where there are fewer.
        seed: of the draw.
        weights: folder of the frozen networks, where the spec needs some.

    Raises:
        InputError: not a dataset of preprocess, made by another method, or its networks are not there.
    """
    dataset = Dataset.open(location, FEATURES)
    settings = _settings_of(dataset, weights)
    frozen = find_networks(settings)
    if frozen.as_input.get("weights") != dataset.manifest["inputs"].get("weights"):
        raise InputError(f"{location} was made with other networks than those in {weights}; give the same --weights")
    clip_ids = dataset.read(["clip_id"])["clip_id"].to_pylist()
    drawn = sorted(random.Random(seed).sample(clip_ids, min(count, len(clip_ids))))
    stored = dataset.read(clip_ids=drawn)
    worker = ClipWorker(settings, frozen, own_device())
    try:
        checks = []
        for planned in sorted(find_planned(location, drawn, planned_rows), key=lambda row: row["clip_id"]):
            unit = Unit(unit_id=planned["clip_id"], split=planned["split"], rows=(planned,))
            made, rejects = worker.process(unit, lambda: None)
            old = stored.slice(drawn.index(planned["clip_id"]), 1)
            checks.append(_compare(planned["clip_id"], old, made, rejects))
    finally:
        worker.close()
    unplanned = set(drawn) - {check.clip_id for check in checks}
    checks += [RowCheck(clip_id=clip, outcome="differs", detail="not in the plan") for clip in sorted(unplanned)]
    return checks


def _settings_of(dataset: Dataset, weights: str | None) -> PreprocessSettings:
    if dataset.manifest.get("stage") != STAGE:
        made_by = dataset.manifest.get("stage")
        raise InputError(
            f"{dataset.folder.uri} was made by {made_by} from another dataset; give the one that preprocess made"
        )
    config = dict(dataset.manifest["config"])
    if config.pop("method") != METHOD:
        raise InputError(f"{dataset.folder.uri} was made by other code, whose rows this code cannot make again")
    return PreprocessSettings(**config, weights=weights)


def _compare(clip_id: str, old: pa.Table, made: pa.Table, rejects: pa.Table) -> RowCheck:
    if rejects.num_rows:
        reason, detail = rejects["reason"][0].as_py(), rejects["detail"][0].as_py()
        return RowCheck(clip_id=clip_id, outcome="gone", detail=f"{reason}: {detail}")
    found = column_differences(old, made, FEATURES)
    if not found:
        return RowCheck(clip_id=clip_id, outcome="equal")
    detail = ", ".join(f"{name} ({error:.2g})" if error is not None else name for name, error in found.items())
    close = all(error is not None and error <= TOLERANCE for error in found.values())
    return RowCheck(clip_id=clip_id, outcome="close" if close else "differs", detail=detail)


def column_differences(old: pa.Table, new: pa.Table, contract: Contract) -> dict[str, float | None]:
    """Columns in which two rows differ, those that name a place left out.

    The value is the largest |difference| of a tensor in parts of its largest value, None for what is no tensor.
    """
    differing: dict[str, float | None] = {}
    for column in contract.columns:
        if not column.in_digest:
            continue
        before, after = old[column.name], new[column.name]
        if not isinstance(before.type, pa.FixedShapeTensorType):
            if before.to_pylist() != after.to_pylist():
                differing[column.name] = None
            continue
        was, now = (column_to_numpy(values).astype(np.float64) for values in (before, after))
        if not np.array_equal(was, now):
            differing[column.name] = float(np.abs(was - now).max() / max(np.abs(was).max(), 1e-12))
    return differing


def summarise(checks: Sequence[RowCheck]) -> dict[str, int]:
    """How many rows had each outcome."""
    outcomes = ("equal", "close", "differs", "gone")
    return {outcome: sum(check.outcome == outcome for check in checks) for outcome in outcomes}
