"""Artifacts on disk: Parquet datasets and folders of files, each with one `manifest.json` written last and once.

Readers trust the manifest alone: what it does not list is foreign, what it lists and is missing or altered is named.
"""

import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.spec import SPECS, ClipSpec
from pipelines.data import digest
from pipelines.data.contracts import CONTRACTS, REJECTS, Contract
from pipelines.data.local_copies import Listed, copy_of
from pipelines.data.storage import Folder, open_folder
from pipelines.data.tables import conform
from pipelines.errors import ContractError, InputError

MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"
"""Kind of an artifact of weights."""
ROW_GROUP_ROWS = 64
STORE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """One Parquet file of a dataset; its rows are all of one split."""

    path: str
    rows: int
    bytes: int
    sha256: str
    split: str | None
    row_groups: tuple[int, ...]
    without_video: int = 0
    """Of its rows those of sound and words alone."""


def encode_part(table: pa.Table, contract: Contract, spec: ClipSpec) -> bytes:
    """Parquet bytes of a conforming table: row groups of 64, zstd, byte-stream-split on float32 tensors.

    float16 keeps plain encoding, since DuckDB (2.0) does not read it byte-stream-split; that costs 7 % of a sample's
    bytes, and no zstd level changes them by more than 0.1 %. The footer carries the row hashes.
    """
    table = conform(table, contract, spec)
    hashes = json.dumps(digest.row_hashes(table, contract)).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), digest.ROW_HASHES: hashes})
    split_columns, dictionary_columns = [], []
    for field in table.schema:
        if isinstance(field.type, pa.FixedShapeTensorType):
            if field.type.value_type == pa.float32():
                split_columns.append(f"{field.name}.list.element")
        elif pa.types.is_string(field.type):
            dictionary_columns.append(field.name)
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=dictionary_columns or False,  # pyright: ignore[reportArgumentType]
        use_byte_stream_split=split_columns or False,  # pyright: ignore[reportArgumentType]
    )
    return sink.getvalue()


def read_manifest(location: str, *, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a finished artifact.

    Raises:
        InputError: nothing is there, the stage has not finished, or it is of another kind.
    """
    folder = open_folder(location)
    if not folder.exists(MANIFEST):
        state = "is not finished: run its stage again" if folder.list_names() else "does not exist or is empty"
        raise InputError(f"{folder.uri} {state} (no {MANIFEST})")
    try:
        manifest = json.loads(folder.read_bytes(MANIFEST))
    except ValueError as error:
        raise ContractError(f"{folder.uri}/{MANIFEST} is not JSON: {error}") from error
    if manifest.get("store_version") != STORE_VERSION:
        raise ContractError(
            f"{folder.uri}: store version {manifest.get('store_version')}, this code reads {STORE_VERSION}"
        )
    if kind is not None and manifest.get("kind") != kind:
        raise InputError(f"{folder.uri} holds a {manifest.get('kind')}, expected a {kind}")
    return manifest


class Dataset:
    """A finished dataset, read through its manifest."""

    def __init__(self, folder: Folder, manifest: Mapping[str, Any], contract: Contract) -> None:
        self.folder = folder
        self.manifest = manifest
        self.contract = contract

    @staticmethod
    def open(location: str, contract: Contract) -> "Dataset":
        """Open by path or URI; checks contract, version and that every listed part is there with its size.

        Raises:
            InputError: not there or not finished.
            ContractError: another contract or version, a part is missing or has another size.
        """
        manifest = read_manifest(location, kind="dataset")
        folder = open_folder(location)
        found = f"{manifest['contract']}/{manifest['version']}"
        wanted = f"{contract.name}/{contract.version}"
        if found != wanted:
            raise ContractError(f"{folder.uri} holds {found}, this code reads {wanted}; make it again with this code")
        for entry in (*manifest["parts"], *manifest["rejects"]):
            size = folder.size_bytes(entry["path"])
            if size != entry["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes, the manifest says {entry['bytes']}"
                raise ContractError(f"{folder.uri}/{entry['path']} {state}; restore it or make the dataset again")
        return Dataset(folder, manifest, contract)

    @property
    def fingerprint(self) -> str:
        """What the dataset was made from: options, inputs, contract."""
        return self.manifest["fingerprint"]

    @property
    def digest(self) -> str:
        """sha256 over the sorted rows' logical values."""
        return self.manifest["digest"]

    @cached_property
    def spec(self) -> ClipSpec:
        """The clip spec of its rows."""
        entry = self.manifest["spec"]
        return SPECS[entry["name"]].with_duration(entry["duration_s"])

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Data parts that have rows, in the manifest's order."""
        return _parts(self.manifest["parts"])

    def num_rows(self, split: str | None = None) -> int:
        """Rows of one split, or of all."""
        return sum(p.rows for p in self.parts if split in (None, p.split))

    def num_without_video(self, split: str | None = None) -> int:
        """Rows of one split, or of all, that are sound and words alone."""
        return sum(p.without_video for p in self.parts if split in (None, p.split))

    @property
    def splits(self) -> dict[str, int]:
        """Rows by split."""
        totals: dict[str, int] = {}
        for part in self.parts:
            totals[str(part.split)] = totals.get(str(part.split), 0) + part.rows
        return totals

    def read_row_group(self, part: Part, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group of one part, only `columns`.

        Raises:
            ContractError: the part has other columns, types or shapes than the contract; each is named.
        """
        names = _checked(self.contract, columns)

        def read(file: pa.NativeFile) -> pa.Table:
            parquet = pq.ParquetFile(file)
            drift = schema_drift(parquet.schema_arrow, self.contract.schema(self.spec))
            if drift:
                raise ContractError(
                    f"{self.folder.uri}/{part.path} breaks contract {self.contract.name}/{self.contract.version}: "
                    f"{'; '.join(drift)}; make the dataset again with this code"
                )
            return parquet.read_row_group(index, columns=names)

        return self.folder.use_file(part.path, read)

    def iter_row_groups(self, columns: Sequence[str] | None = None, split: str | None = None) -> Iterator[pa.Table]:
        """Row groups in the manifest's order: never more than one in memory."""
        for part in self.parts:
            if split in (None, part.split):
                for index in range(len(part.row_groups)):
                    yield self.read_row_group(part, index, columns)

    def read(
        self,
        columns: Sequence[str] | None = None,
        split: str | None = None,
        clip_ids: Sequence[str] | None = None,
    ) -> pa.Table:
        """All rows (of a split, of some clips), sorted by clip_id; for what fits in memory."""
        names = _checked(self.contract, columns)
        wanted = [c.name for c in self.contract.columns] if names is None else list(names)
        with_key = wanted if "clip_id" in wanted else ["clip_id", *wanted]
        groups = []
        keep = set(clip_ids or ())
        for group in self.iter_row_groups(with_key, split):
            if clip_ids is not None:
                group = group.filter(pa.array([clip in keep for clip in group["clip_id"].to_pylist()], pa.bool_()))
            groups.append(group)
        schema = self.contract.schema(self.spec)
        empty = pa.schema([schema.field(n) for n in with_key]).empty_table()
        table = pa.concat_tables([empty, *(g.replace_schema_metadata(None) for g in groups)])
        return table.sort_by([(k, "ascending") for k in self.contract.key if k in with_key]).select(wanted)

    def read_rejects(self) -> pa.Table:
        """All rejects, sorted by clip."""
        tables = [REJECTS.schema(self.spec).remove_metadata().empty_table()]
        for part in _parts(self.manifest["rejects"]):
            rejects = self.folder.use_file(part.path, lambda file: pq.ParquetFile(file).read())
            tables.append(rejects.replace_schema_metadata(None))
        return pa.concat_tables(tables).sort_by("clip_id")


def schema_drift(found: pa.Schema, wanted: pa.Schema) -> list[str]:
    """What a part's schema has other than its contract's, a line each: columns too many, missing, of another type."""
    theirs, ours = ({field.name: field.type for field in schema} for schema in (found, wanted))
    return [
        *(f"column '{name}' is unknown" for name in theirs if name not in ours),
        *(f"column '{name}' is missing" for name in ours if name not in theirs),
        *(
            f"column '{name}' is {theirs[name]}, not {ours[name]}"
            for name in ours
            if name in theirs and theirs[name] != ours[name]
        ),
    ]


def _parts(entries: Sequence[Mapping[str, Any]]) -> tuple[Part, ...]:
    return tuple(Part(**{**entry, "row_groups": tuple(entry["row_groups"])}) for entry in entries if entry["rows"])


def _checked(contract: Contract, columns: Sequence[str] | None) -> list[str] | None:
    return None if columns is None else [contract.column(name).name for name in columns]


def files_manifest(folder: Folder, names: Sequence[str]) -> list[dict[str, Any]]:
    """Manifest entries (path, bytes, sha256) of files of an artifact that is not a dataset."""
    return [{"path": name, "bytes": folder.size_bytes(name), "sha256": folder.sha256(name)} for name in sorted(names)]


def open_files(location: str, kind: str, only: Collection[str] | None = None) -> tuple[Folder, dict[str, Any]]:
    """A finished artifact of files (a checkpoint, a report), with every listed file's hash verified.

    `only`: verify those of these names alone, where a reader leaves the others (gigabytes) untouched.

    Raises:
        InputError: not there, unfinished or another kind.
        ContractError: a file is missing or altered.
    """
    manifest = read_manifest(location, kind=kind)
    folder = open_folder(location)
    for entry in manifest["files"]:
        if only is not None and entry["path"] not in only:
            continue
        if folder.size_bytes(entry["path"]) is None:
            raise ContractError(f"{folder.uri}/{entry['path']} is missing; make the artifact again")
        if folder.sha256(entry["path"]) != entry["sha256"]:
            raise ContractError(f"{folder.uri}/{entry['path']} does not have the manifest's sha256; it was altered")
    return folder, manifest


def open_local_files(location: str, kind: str, only: Collection[str] | None = None) -> tuple[Path, dict[str, Any]]:
    """As `open_files`, for what opens files by path: where they lie, or of an object store a verified copy of them.

    Raises:
        InputError: as `open_files`.
        ContractError: as `open_files`.
        EnvironmentFailed: the copy cannot be made.
    """
    folder = open_folder(location)
    if folder.is_local:
        folder, manifest = open_files(location, kind, only)
        return folder.local_path(), manifest
    manifest = read_manifest(location, kind=kind)
    listed = [Listed(entry["path"], entry["bytes"], entry["sha256"]) for entry in manifest["files"]]
    return copy_of(folder, listed, only=only), manifest


def local_folder(location: str, kind: str, only: Collection[str] | None = None) -> Path:
    """Where files lie on this machine that were opened and verified before: a mounted folder, or a verified copy."""
    folder = open_folder(location)
    return folder.local_path() if folder.is_local else open_local_files(location, kind, only)[0]


def is_finished(location: str) -> bool:
    """Whether an artifact lies there whole: its manifest is written last."""
    return open_folder(location).exists(MANIFEST)


def contract_of(manifest: Mapping[str, Any]) -> Contract:
    """The contract that a dataset's manifest names."""
    return CONTRACTS[manifest["contract"]]
