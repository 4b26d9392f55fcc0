"""What there is to process, as one Arrow table: a row is one line of a list, one file of a folder or one tar member.

Columnar because a corpus may have ten million rows: objects of Python cost a kilobyte each, these some 200 bytes.
Names are binary columns: a file's name may hold bytes that are not UTF-8, which no Arrow string can.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.names import escape
from pipelines.errors import InputError

BATCH_ROWS = 1 << 16
# Names and texts have 64-bit offsets: in one array of ten million rows they exceed 2 GiB.
ENTRY_SCHEMA = pa.schema(
    [
        # 1-based line of the manifest or list, Parquet row; 0 for what was found in a folder.
        pa.field("line", pa.int64(), nullable=False),
        # As given, or relative to the folder; a tar member as `<tar>!/<member>`.
        pa.field("video", pa.large_binary(), nullable=False),
        # Where it lies: an absolute path or a URI; of a tar member, its tar.
        pa.field("uri", pa.large_binary(), nullable=False),
        pa.field("member", pa.large_binary()),
        pa.field("offset", pa.int64()),
        pa.field("size_bytes", pa.int64()),
        # A file (or bytes of the tar) beside the video that holds its sound.
        pa.field("sound_uri", pa.large_binary()),
        pa.field("sound_offset", pa.int64()),
        pa.field("sound_size_bytes", pa.int64()),
        # Offset in the file at hand, seconds.
        pa.field("start_s", pa.float64(), nullable=False),
        # Length of the usable part from start_s, seconds; null: to the end of the file.
        pa.field("duration_s", pa.float64()),
        pa.field("caption", pa.large_string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        # JSON list of time_s (from the file's own start), duration_s, kind, variant; null where unknown.
        pa.field("events", pa.large_string()),
        # A reject that is known without opening the file.
        pa.field("reason", pa.string()),
        pa.field("detail", pa.large_string()),
    ]
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_SAID = ("video", "start_s", "duration_s", "caption", "split", "events", "reason")


class Piece(NamedTuple):
    """Bytes to open: a whole file, or a range of a tar."""

    uri: str
    offset: int | None = None
    size_bytes: int | None = None


class FoundFile(NamedTuple):
    """A file that a listing gave."""

    name: str
    """Relative to the folder that was listed."""
    uri: str
    problem: tuple[str, str] | None
    """(reason, detail) why it must not be opened."""


@dataclass(frozen=True, kw_only=True)
class Entries:
    """What a manifest, a list or a folder holds, without its exact repeats."""

    table: pa.Table
    """Columns of `ENTRY_SCHEMA`, in the order they were given."""
    num_repeated: int
    """Rows left out because an earlier one names the same file, start and duration."""
    kind: str
    """`manifest`, `folder`, or the name of a foreign list's format."""
    num_excluded: Mapping[str, int | None] = field(default_factory=dict)
    """Clips taken out, by option; None: it is not known how many should have been."""

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that the manifest says, in any order of its rows; where it lies is not part of it."""
        digests = bytearray()
        for batch in self.table.select([*_SAID, "sound_uri"]).to_batches(max_chunksize=BATCH_ROWS):
            columns = [batch.column(name).to_pylist() for name in (*_SAID, "sound_uri")]
            for video, *said, sound in zip(*columns, strict=True):
                # Of the sound beside it the name counts, and not the folder, which is the video's.
                beside = sound and text_of(sound).rpartition("/")[2]
                row = json.dumps([text_of(video), *said, beside], separators=(",", ":"))
                digests += hashlib.sha256(row.encode()).digest()
        words = np.frombuffer(digests, dtype=">u8").reshape(-1, 4)
        return hashlib.sha256(words[np.lexsort(words.T[::-1])].tobytes()).hexdigest()

    @property
    def num_missing(self) -> int:
        """Clips that are named and not there."""
        return self.table.select(["reason"]).filter(pc.field("reason") == "missing").num_rows

    def missing_names(self, limit: int = 5) -> list[str]:
        """The first of the missing clips, in printable form."""
        gone = self.table.select(["video", "reason"]).filter(pc.field("reason") == "missing").slice(0, limit)
        return [escape(text_of(video)) for video in gone["video"].to_pylist()]

    def rows(self) -> list[dict[str, Any]]:
        """Every row as plain values, names as `str`: for few rows only."""
        return [plain_row(row) for row in self.table.to_pylist()]

    def keep(self, mask: Sequence[bool] | np.ndarray) -> "Entries":
        """The rows where `mask` is true."""
        return replace(self, table=self.table.filter(pa.array(mask, pa.bool_())))


class EntryBuilder:
    """Takes rows one by one and holds them as columns."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._batches: list[pa.RecordBatch] = []

    def add(
        self,
        *,
        line: int,
        video: str,
        piece: Piece,
        member: str | None = None,
        sound: Piece | None = None,
        start_s: float = 0.0,
        duration_s: float | None = None,
        caption: str = "",
        split: str = "train",
        events: str | None = None,
        problem: tuple[str, str] | None = None,
    ) -> None:
        """Add one row; see `ENTRY_SCHEMA`. `problem` is (reason, detail) of a reject."""
        self._rows.append(
            (
                line,
                name_bytes(video),
                name_bytes(piece.uri),
                None if member is None else name_bytes(member),
                piece.offset,
                piece.size_bytes,
                *((None, None, None) if sound is None else (name_bytes(sound.uri), sound.offset, sound.size_bytes)),
                start_s,
                duration_s,
                caption,
                split,
                events,
                *((None, None) if problem is None else problem),
            )
        )
        if len(self._rows) == BATCH_ROWS:
            self._flush()

    def finish(self, *, kind: str, location: str) -> Entries:
        """All rows, of exact repeats the first.

        Raises:
            InputError: there is no row.
        """
        self._flush()
        if not self._batches:
            raise InputError(f"{location} names no media file")
        table = pa.Table.from_batches(self._batches, ENTRY_SCHEMA)
        self._batches = []
        first = _first_of_each(table)
        num_repeated = table.num_rows - len(first)
        return Entries(
            table=table.combine_chunks().take(pa.array(first)) if num_repeated else table,
            num_repeated=num_repeated,
            kind=kind,
        )

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [
                pa.array(_texts(values) if f.type == pa.large_string() else values, f.type)
                for f, values in zip(ENTRY_SCHEMA, columns, strict=True)
            ]
            self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=ENTRY_SCHEMA))
            self._rows = []


def file_codes(table: pa.Table) -> np.ndarray:
    """int64 [rows]: a number for every file of a table with `uri` and `offset`; each member of a tar is one."""
    # In one piece: over many chunks the dictionary would be made anew with each of them.
    codes = table["uri"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    if table["offset"].null_count == table.num_rows:
        return codes
    offsets = table["offset"].fill_null(-1).to_numpy()
    return np.unique(np.stack([codes, offsets]), axis=1, return_inverse=True)[1].reshape(-1)


def _first_of_each(table: pa.Table) -> np.ndarray:
    """Ascending indices of the rows that are not repeats of (file, start, duration)."""
    codes = file_codes(table)
    # Numbers and not the names: grouping by names would hold all of them once more.
    if len(np.unique(codes)) == len(codes):
        return np.arange(len(codes))
    keys = {"file": pa.array(codes), "start_s": table["start_s"], "duration_s": table["duration_s"]}
    rows = pa.table({**keys, "row": pa.array(np.arange(len(codes)))})
    return np.sort(rows.group_by(list(keys)).aggregate([("row", "min")])["row_min"].to_numpy())


def name_bytes(name: str) -> bytes:
    """A name as bytes; what stands for bytes that are not UTF-8 becomes those bytes again."""
    return name.encode("utf-8", "surrogateescape")


def text_of(name: bytes) -> str:
    """The inverse of `name_bytes`."""
    return name.decode("utf-8", "surrogateescape")


def decode_events(events: str | None) -> list[dict[str, Any]] | None:
    """The `events` column as a list of dictionaries; None stays unknown."""
    return None if events is None else json.loads(events)


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of entries or of a plan as plain values: names as `str`, events as a list of dictionaries."""
    plain = {name: text_of(value) if isinstance(value, bytes) else value for name, value in row.items()}
    return {**plain, "events": decode_events(row["events"])}


def _texts(values: Iterable[str | None]) -> list[str | None]:
    """Texts in which a U+FFFD stands for every byte that is not UTF-8 (and for lone surrogates of JSON)."""
    return [value and _SURROGATE.sub("\ufffd", value) for value in values]
