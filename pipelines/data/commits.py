"""Committing units of rows, exactly once, and the manifest of everything that was committed.

A unit leaves three files, in this order: its rejects (if any), a receipt (rows, bytes, sha256 and row hashes of what it
writes), its part. The part's name is what says that the unit is done, so a unit is done or not done, whoever died
when, and a unit done twice overwrites itself. A finished stage is described from the receipts alone: parts are not read
again, only their sizes are compared with one listing.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from models.spec import ClipSpec
from pipelines.data import digest
from pipelines.data.contracts import REJECTS, Contract
from pipelines.data.storage import Folder
from pipelines.data.store import Part, encode_part
from pipelines.errors import ContractError

RECEIPTS = "receipts"
SUFFIX = ".parquet"


class UnitOfRows(Protocol):
    """What is committed together: an id, and the rows that went in."""

    @property
    def unit_id(self) -> str:
        """Deterministic name."""
        ...

    @property
    def rows(self) -> tuple[Any, ...]:
        """The input rows."""
        ...


def part_name(sub: str, unit_id: str) -> str:
    """Name of a unit's part in `data` or `rejects`."""
    return f"{sub}/part-{unit_id}{SUFFIX}"


def commit_unit(
    folder: Folder, unit: UnitOfRows, table: pa.Table, rejects: pa.Table, contract: Contract, spec: ClipSpec
) -> None:
    """Write a unit's rejects, its receipt and its part.

    Raises:
        ContractError: a row breaks the contract.
        RuntimeError: rows and rejects do not add up to the unit.
    """
    if table.num_rows + rejects.num_rows != len(unit.rows):
        raise RuntimeError(
            f"unit {unit.unit_id}: {len(unit.rows)} rows in, {table.num_rows} out and {rejects.num_rows} rejected"
        )
    receipt = []
    rejected = None
    if rejects.num_rows:
        rejected = encode_part(rejects, REJECTS, spec)
        receipt.append(_entry(part_name("rejects", unit.unit_id), rejected))
    content = encode_part(table, contract, spec)
    receipt.append(_entry(part_name("data", unit.unit_id), content))
    if rejected is not None:
        folder.write_bytes(part_name("rejects", unit.unit_id), rejected)
    folder.write_bytes(f"{RECEIPTS}/{unit.unit_id}.json", json.dumps(receipt).encode())
    folder.write_bytes(part_name("data", unit.unit_id), content)


def done_units(folder: Folder) -> set[str]:
    """Ids of the units whose part and receipt are there."""
    parts = {
        name[len("part-") : -len(SUFFIX)]
        for name in folder.list_names("data")
        if name.startswith("part-") and name.endswith(SUFFIX)
    }
    receipts = {name[: -len(".json")] for name in folder.list_names(RECEIPTS) if name.endswith(".json")}
    return parts & receipts


def dataset_manifest(folder: Folder, contract: Contract, spec: ClipSpec) -> dict[str, Any]:
    """Manifest fields of everything that was committed in a folder, checked: no key twice, every part of its size.

    Raises:
        ContractError: a key occurs in two parts, or a part is not the one that its receipt describes.
    """
    found: dict[str, list[dict[str, Any]]] = {"data": [], "rejects": []}
    seen: dict[str, str] = {}
    hashes: list[tuple[str, str]] = []
    sizes = {sub: folder.list_infos(sub) for sub in found}
    for entry in _receipts(folder):
        sub, name = entry["part"]["path"].split("/")
        if sizes[sub].get(name) != entry["part"]["bytes"]:
            raise ContractError(
                f"{folder.uri}/{sub}/{name} has {sizes[sub].get(name)} bytes, its receipt says "
                f"{entry['part']['bytes']}; remove the file and run the same command again"
            )
        found[sub].append(entry["part"])
        for key, value in entry["row_hashes"]:
            clip = key.split("\x1f")[0]
            if clip in seen:
                raise ContractError(f"{folder.uri}: clip '{clip}' is in {seen[clip]} and in {sub}/{name}")
            seen[clip] = f"{sub}/{name}"
            hashes.append((f"{sub}\x1f{key}", value))
    rows = {sub: sum(part["rows"] for part in parts) for sub, parts in found.items()}
    return {
        "kind": "dataset",
        "contract": contract.name,
        "version": contract.version,
        "spec": {"name": spec.name, "duration_s": spec.duration_s},
        "parts": found["data"],
        "rejects": found["rejects"],
        "counts": {"in": rows["data"] + rows["rejects"], "out": rows["data"], "rejected": rows["rejects"]},
        "digest": digest.combine(hashes),
    }


def remove_leftovers(folder: Folder) -> None:
    """Delete what a killed run left half written; to be called by the one writer of the folder, before it starts."""
    for sub in ("", "data", "rejects", RECEIPTS):
        folder.remove_temporaries(sub)


def sweep(folder: Folder, content: dict[str, Any]) -> None:
    """Remove what an interrupted run may have left in `data` and `rejects` and the manifest does not list.

    To be called by the one writer of the folder, before the manifest is written.
    """
    listed = {entry["path"] for entry in (*content["parts"], *content["rejects"])}
    for sub in ("data", "rejects"):
        for name in folder.list_names(sub):
            if f"{sub}/{name}" not in listed:
                folder.delete(f"{sub}/{name}")


def _receipts(folder: Folder) -> Iterator[dict[str, Any]]:
    """The entries of every done unit's receipt, in the order of their names."""
    for _, receipt in folder.read_many(f"{RECEIPTS}/{unit_id}.json" for unit_id in sorted(done_units(folder))):
        yield from json.loads(receipt)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """One file of a receipt: its manifest entry and its rows' (key, hash), from the bytes that are written."""
    file = pq.ParquetFile(io.BytesIO(content))
    metadata = file.metadata
    footer: dict[bytes, bytes] = metadata.metadata or {}
    part = Part(
        path=name,
        rows=metadata.num_rows,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        split=_split(file, name),
        row_groups=tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)),
        without_video=_without_video(file),
    )
    row_hashes = json.loads(footer[digest.ROW_HASHES])
    return {"part": vars(part) | {"row_groups": list(part.row_groups)}, "row_hashes": row_hashes}


def _without_video(file: pq.ParquetFile) -> int:
    if "has_video" not in file.schema_arrow.names:
        return 0
    return file.read(columns=["has_video"])["has_video"].to_pylist().count(False)


def _split(file: pq.ParquetFile, name: str) -> str | None:
    if not file.metadata.num_rows or "split" not in file.schema_arrow.names:
        return None
    splits: Iterable[str] = set(file.read(columns=["split"])["split"].to_pylist())
    if len(set(splits)) != 1:
        raise ContractError(f"{name}: rows of splits {sorted(splits)} in one part; one is allowed")
    return next(iter(splits))
