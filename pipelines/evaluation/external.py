"""Files of embeddings and logits that the user's own evaluation networks made -> rows by `clip_id`.

Rows are known by their id and never by their position.

A file has one row a clip: ids under the name `clip_id`, and one float array [B, width] under any other name.
- `.parquet`: a text column, and one column of float lists or tensors; columns of other types are passed over.
- `.npz`: a text array `clip_id` (not of objects), and one 2-D float array.
- `.safetensors`: metadata `clip_id`, a JSON list of texts, and one 2-D float tensor.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from pipelines.data.storage import open_folder
from pipelines.data.tables import column_to_numpy
from pipelines.errors import InputError
from pipelines.evaluation.embedding_metrics import KINDS

CLIP_ID = "clip_id"
_UNREADABLE = (
    ValueError,
    KeyError,
    OSError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    pa.ArrowException,
    SafetensorError,
)


@dataclass(frozen=True, kw_only=True)
class ExternalFiles:
    """Where the rows of one kind lie: paths or URIs."""

    generated: str
    reference: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExternalRows:
    """What one file holds, sorted by `clip_id`; every id once, every value finite."""

    location: str
    clip_ids: tuple[str, ...]
    values: np.ndarray
    """float64 [B, width]."""

    def only(self, clip_ids: Collection[str]) -> np.ndarray:
        """Values [b, width] of those of the clips that are here, sorted by id."""
        return self.values[[i for i, clip_id in enumerate(self.clip_ids) if clip_id in clip_ids]]

    def without(self, clip_ids: Collection[str]) -> Self:
        """The rows of all other clips; may be none."""
        kept = tuple(clip_id for clip_id in self.clip_ids if not is_among(clip_id, clip_ids))
        return type(self)(location=self.location, clip_ids=kept, values=self.only(frozenset(kept)))


def is_among(clip_id: str, file_ids: Collection[str]) -> bool:
    """Whether a clip, or the file that it is one window of (`<file>#<start in ms>`), is among the ids."""
    return clip_id in file_ids or clip_id.rsplit("#", 1)[0] in file_ids


def files_in(generated: str, reference: str | None = None) -> dict[str, ExternalFiles]:
    """The files of two folders by kind: `<kind>.parquet`, `.npz` or `.safetensors`, such as `panns_logits.npz`.

    Files of other suffixes, and references of kinds that were not generated, are passed over.

    Raises:
        InputError: a folder holds no such file, a name that is no kind, or one kind twice.
    """
    made, real = _by_kind(generated), {} if reference is None else _by_kind(reference)
    return {kind: ExternalFiles(generated=made[kind], reference=real.get(kind)) for kind in KINDS if kind in made}


def _by_kind(location: str) -> dict[str, str]:
    folder = open_folder(location)
    try:
        names = folder.list_names()
    except OSError as error:
        raise InputError(f"{location} cannot be listed: {one_line(error)}") from error
    found: dict[str, str] = {}
    for name in names:
        kind, suffix = Path(name).stem, Path(name).suffix.lower()
        if suffix not in _READERS:
            continue
        if kind not in KINDS:
            raise InputError(f"{folder.uri}/{name}: {kind!r} is no kind of file; name it one of {', '.join(KINDS)}")
        if kind in found:
            raise InputError(f"{folder.uri} holds {kind} twice ({Path(found[kind]).name}, {name}); keep one")
        found[kind] = f"{folder.uri}/{name}"
    if not found:
        raise InputError(f"{location} holds no external file; name them <kind>.parquet with one of {', '.join(KINDS)}")
    return found


def read_ids(location: str) -> frozenset[str]:
    """Ids from `vggss.json` (a list of {"file": id, ...}) or from a text file with one id a line.

    Raises:
        InputError: it cannot be read or holds no id.
    """
    content = _content(location)
    try:
        text = content.decode("utf-8-sig")
        ids = [entry["file"] for entry in json.loads(text)] if location.lower().endswith(".json") else text.split("\n")
        found = frozenset(name.strip() for name in ids) - {""}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{location} is no list of ids ({one_line(error)}); give vggss.json or one id a line"
        ) from error
    if not found:
        raise InputError(f"{location} holds no ids")
    return found


def read_external(location: str) -> ExternalRows:
    """Read one file by path or URI; its form is told by its suffix.

    Raises:
        InputError: it is not there or cannot be read, ids are missing or come twice, rows have unequal widths, or a
            value is not finite; one line that names the file and, where one is at fault, the clip.
    """
    suffix = Path(location).suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"{location}: {suffix!r} is not one of {', '.join(_READERS)}")
    content = _content(location)
    try:
        clip_ids, values = _READERS[suffix](content)
        rows = _checked(clip_ids, values)
    except _UNREADABLE as error:
        raise InputError(
            f"{location} cannot be used ({one_line(error)}); write {CLIP_ID!r} and one float array, a row a clip"
        ) from error
    return ExternalRows(location=location, clip_ids=tuple(rows), values=values[list(rows.values())].astype(np.float64))


def _content(location: str) -> bytes:
    parent, _, name = location.rpartition("/")
    try:
        folder = open_folder(parent or ".")
        if folder.size_bytes(name) is None:
            raise InputError(f"{location} does not exist or is not a file")
        return folder.read_bytes(name)
    except OSError as error:
        raise InputError(f"{location} cannot be read: {one_line(error)}") from error


def _checked(clip_ids: Sequence[str], values: np.ndarray) -> dict[str, int]:
    """clip_id -> its row, sorted by id; raises ValueError where the file breaks its form."""
    if len(clip_ids) != len(values) or values.size == 0:
        raise ValueError(f"{len(clip_ids)} ids and an array of shape {values.shape}")
    rows = dict(sorted((clip_id, index) for index, clip_id in enumerate(clip_ids)))
    if "" in rows:
        raise ValueError(f"the id of row {rows['']} is empty")
    if len(rows) < len(clip_ids):
        twice = next(c for i, c in enumerate(clip_ids) if rows[c] != i)
        raise ValueError(f"{len(clip_ids) - len(rows)} rows repeat an id, such as {twice!r}")
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} clips have values that are not finite, such as {clip_ids[int(bad.argmax())]!r}"
        )
    return rows


def _read_parquet(content: bytes) -> tuple[list[str], np.ndarray]:
    file = pq.ParquetFile(pa.BufferReader(content))
    name = _the_one([field.name for field in file.schema_arrow if _is_vector(field.type)])
    table = file.read(columns=[CLIP_ID, name])
    ids = table[CLIP_ID]
    if ids.null_count or table[name].null_count:
        raise ValueError(f"{ids.null_count} ids and {table[name].null_count} rows are null")
    return _texts(ids.to_pylist()), _matrix(table[name])


def _is_vector(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.FixedShapeTensorType):
        return len(kind.shape) == 1 and pa.types.is_floating(kind.value_type)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_floating(kind.value_type)


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of float vectors without null rows -> [B, width]; a null inside a row becomes NaN."""
    if isinstance(column.type, pa.FixedShapeTensorType):
        return column_to_numpy(column)
    array = column.combine_chunks()
    widths = sorted(set(array.value_lengths().to_pylist()))
    if len(widths) != 1:
        raise ValueError(f"{len(column)} rows of {widths[:1]} to {widths[-1:]} values; all must have one width")
    flat = array.flatten().cast(pa.float64()).fill_null(np.nan)
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), widths[0])


def _read_npz(content: bytes) -> tuple[list[str], np.ndarray]:
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ValueError("it is no npz archive, or cut short")
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if CLIP_ID not in arrays:
        raise ValueError(f"it holds no array {CLIP_ID!r}")
    ids = arrays.pop(CLIP_ID)
    name = _the_one([n for n, array in arrays.items() if array.ndim == 2 and array.dtype.kind == "f"])
    return _texts((np.char.decode(ids, "utf-8") if ids.dtype.kind == "S" else ids).tolist()), arrays[name]


def _read_safetensors(content: bytes) -> tuple[list[str], np.ndarray]:
    # Through torch, which knows bfloat16.
    tensors = load_safetensors(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {})
    if CLIP_ID not in metadata:
        raise ValueError(f"its metadata have no {CLIP_ID!r}")
    name = _the_one([n for n, tensor in tensors.items() if tensor.ndim == 2 and tensor.is_floating_point()])
    return _texts(json.loads(metadata[CLIP_ID])), tensors[name].double().numpy()


_READERS: dict[str, Callable[[bytes], tuple[list[str], np.ndarray]]] = {
    ".parquet": _read_parquet,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}


def _the_one(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise ValueError(f"it holds {len(names)} float arrays of a row a clip {sorted(names)[:4]}, and one is wanted")
    return names[0]


def _texts(ids: object) -> list[str]:
    if not isinstance(ids, list) or not all(isinstance(clip_id, str) for clip_id in ids):
        raise ValueError(f"{CLIP_ID} is not a list of texts")
    return ids


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
