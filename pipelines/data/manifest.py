"""What to process: input manifests and folders of videos -> one row a window, each with its key.

A manifest is csv, tsv or Parquet with `video` and optionally `start_s`, `duration_s`, `caption`, `split`, `events`.
It is input from outside: a `video` that could name anything but a file under the manifest's folder, or an object on
known storage, becomes a reject before anything is opened; what cannot be parsed ends the job with its line.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pipelines.data.contracts import SPLITS
from pipelines.data.storage import open_folder
from pipelines.errors import InputError

COLUMNS = ("video", "start_s", "duration_s", "caption", "split", "events")
MEDIA_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})
STORAGE_SCHEMES = frozenset({"s3", "gs", "gcs", "hdfs", "abfs", "abfss"})
MAX_MISSING = 0.05
WINDOW_TOLERANCE_S = 0.001
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|subfile,")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a manifest, or one file of a folder."""

    line: int
    """1-based line (or Parquet row); 0 for a file of a folder."""
    video: str
    """As given."""
    uri: str
    """Where it lies: an absolute path or a URI."""
    start_s: float = 0.0
    duration_s: float | None = None
    """Length of the usable part from `start_s`; None: to the end of the file."""
    caption: str = ""
    split: str = "train"
    events: tuple[dict[str, Any], ...] | None = None
    """Known events, times in seconds from the file's own start."""
    problem: tuple[str, str] | None = None
    """(reason, detail) of a reject that is known without opening the file."""

    @property
    def place(self) -> str:
        """What to call this entry in a message."""
        return f"line {self.line} ({escape(self.video)})" if self.line else escape(self.video)


@dataclass(frozen=True, kw_only=True)
class ClipRow:
    """One window to make a row of; plain values, so that it travels to workers."""

    clip_id: str
    entry: Entry = field(repr=False)
    start_s: float

    def as_dict(self) -> dict[str, Any]:
        """The fields a worker needs, as plain values."""
        entry = self.entry
        return {
            "clip_id": self.clip_id,
            "split": entry.split,
            "uri": entry.uri,
            "source": escape(entry.uri),
            "start_s": self.start_s,
            "caption": entry.caption,
            "events": None if entry.events is None else list(entry.events),
            "problem": entry.problem,
        }


@dataclass(frozen=True, kw_only=True)
class Entries:
    """What a manifest or a folder holds, without its exact repeats."""

    entries: tuple[Entry, ...]
    num_repeated: int

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that the manifest says; where it lies is not part of it."""
        total = hashlib.sha256()
        for e in sorted(self.entries, key=lambda e: (e.video, e.start_s)):
            fields = [e.video, e.start_s, e.duration_s, e.caption, e.split, e.events, e.problem and e.problem[0]]
            total.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
        return total.hexdigest()


def escape(text: str) -> str:
    """NFC; everything that is not printable, and bytes that are not UTF-8, as %XX of their bytes."""
    return "".join(
        c if c.isprintable() else "".join(f"%{b:02X}" for b in c.encode("utf-8", "surrogateescape"))
        for c in unicodedata.normalize("NFC", text)
    )


def clip_key(video: str) -> str:
    """The key of a file: its escaped stem."""
    return escape(PurePosixPath(video).stem).replace("/", "%2F")


def read_entries(location: str) -> Entries:
    """Read a manifest by path or URI.

    Raises:
        InputError: it is not there, cannot be parsed (with the line) or is empty.
    """
    parent, _, name = location.rpartition("/")
    folder = open_folder(parent or ".")
    if folder.size_bytes(name) is None:
        raise InputError(f"manifest {location} does not exist or is not a file")
    content = folder.read_bytes(name)
    base = folder.uri
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet":
        records = _parquet_records(content, location)
    elif suffix in (".csv", ".tsv"):
        records = _text_records(content, location, "\t" if suffix == ".tsv" else ",")
    else:
        raise InputError(f"manifest {location}: '{suffix}' is not one of .csv, .tsv, .parquet")
    return _distinct((_entry(record, line, base, location) for line, record in records), location)


def list_videos(location: str, *, follow: bool = False) -> Entries:
    """All media files under a folder, by suffix, recursively; links that leave it only with `follow`.

    Raises:
        InputError: no such folder, or no media file in it.
    """
    folder = open_folder(location)
    if not folder.is_local:
        import pyarrow.fs as pafs

        infos = folder.filesystem.get_file_info(pafs.FileSelector(folder.path, recursive=True, allow_not_found=True))
        names = sorted(i.path[len(folder.path) + 1 :] for i in infos if i.type == pafs.FileType.File)
        media = [n for n in names if PurePosixPath(n).suffix.lower() in MEDIA_SUFFIXES]
        return _distinct((Entry(line=0, video=n, uri=f"{folder.uri}/{n}") for n in media), location)
    root = Path(folder.path)
    if not root.is_dir():
        raise InputError(f"--videos {location} is not a folder")
    return _distinct((_found(root, path, follow) for path in _walk(root, follow)), location)


def plan_windows(
    entries: Iterable[Entry],
    *,
    clip_s: float,
    windows: Literal["first", "all"] = "first",
    hop_s: float | None = None,
    length_of: Callable[[Entry], float | None] = lambda entry: None,
) -> list[ClipRow]:
    """One row a window: `first` takes one from `start_s`; `all` every whole window at multiples of `hop_s`.

    Args:
        entries: the manifest's entries.
        clip_s: length of a window in seconds.
        windows: which windows.
        hop_s: seconds between the starts of windows of one file (default: `clip_s`).
        length_of: seconds a file holds, None where it cannot be told; asked for `all` alone.

    Raises:
        InputError: two entries give the same key; both are named.
    """
    planned: list[tuple[Entry, float]] = []
    for entry in entries:
        entry = _too_short(entry, clip_s)
        if windows == "first" or entry.problem is not None:
            planned.append((entry, entry.start_s))
        else:
            planned += [(entry, start) for start in _starts(entry, clip_s, hop_s or clip_s, length_of(entry))]
    per_file = Counter(entry.uri for entry, _ in planned)
    rows: dict[str, ClipRow] = {}
    for entry, start_s in planned:
        key = clip_key(entry.video)
        if per_file[entry.uri] > 1:
            key = f"{key}#{round(start_s * 1000)}"
        if key in rows:
            raise InputError(
                f"two entries give the key '{key}': {rows[key].entry.place} and {entry.place}; "
                "rename one file, or take one out"
            )
        rows[key] = ClipRow(clip_id=key, entry=entry, start_s=start_s)
    return list(rows.values())


def _starts(entry: Entry, clip_s: float, hop_s: float, length_s: float | None) -> list[float]:
    ends = [e for e in (length_s, None if entry.duration_s is None else entry.start_s + entry.duration_s) if e]
    if not ends:
        return [entry.start_s]
    count = math.floor((min(ends) - entry.start_s - clip_s + WINDOW_TOLERANCE_S) / hop_s) + 1
    return [entry.start_s + k * hop_s for k in range(max(count, 1))]


def _too_short(entry: Entry, clip_s: float) -> Entry:
    if entry.problem is None and entry.duration_s is not None and entry.duration_s < (1 - MAX_MISSING) * clip_s:
        detail = f"the manifest gives it {entry.duration_s:g} s, a clip takes {clip_s:g} s"
        return Entry(**{**vars(entry), "problem": ("too_short", detail)})
    return entry


def _distinct(entries: Iterable[Entry], location: str) -> Entries:
    kept: dict[tuple[str, float, float | None], Entry] = {}
    count = 0
    for entry in entries:
        count += 1
        kept.setdefault((entry.uri, entry.start_s, entry.duration_s), entry)
    if not kept:
        raise InputError(f"{location} names no media file")
    return Entries(entries=tuple(kept.values()), num_repeated=count - len(kept))


def _text_records(content: bytes, location: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Names may hold bytes that are not UTF-8; they survive as surrogates, as in the file system's own names.
    text = content.decode("utf-8-sig", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{location}, line {line}: {error}") from error
        if fields is None:
            break
        if not fields:
            continue
        if header is None:
            header = _header([name.strip() for name in fields], location)
        elif len(fields) != len(header):
            raise InputError(f"{location}, line {line}: {len(fields)} fields, the header has {len(header)}")
        else:
            yield line, dict(zip(header, fields, strict=True))
    if header is None:
        raise InputError(f"{location} is empty; its first line must name the columns, 'video' among them")


def _header(names: Sequence[str], location: str) -> list[str]:
    if "video" not in names:
        shown = ", ".join(escape(n)[:30] for n in names[:8])
        raise InputError(f"{location}, line 1: no column 'video' among: {shown}")
    if len(set(names)) != len(names):
        raise InputError(f"{location}, line 1: a column name occurs twice")
    return list(names)


def _parquet_records(content: bytes, location: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(content))
    except pa.ArrowException as error:
        raise InputError(f"{location} is not a Parquet file: {error}") from error
    names = _header(file.schema_arrow.names, location)
    line = 0
    for batch in file.iter_batches(columns=[n for n in names if n in COLUMNS]):
        for record in batch.to_pylist():
            line += 1
            yield line, record


def _entry(record: Mapping[str, Any], line: int, base: str, location: str) -> Entry:
    where = f"{location}, line {line}"
    video = record["video"]
    if not isinstance(video, str) or not video.strip():
        raise InputError(f"{where}: 'video' is empty")
    split = record.get("split") or "train"
    if split not in SPLITS:
        raise InputError(f"{where}: split '{split}' is not one of {', '.join(SPLITS)}")
    start_s = _seconds(record.get("start_s"), "start_s", where)
    duration_s = _seconds(record.get("duration_s"), "duration_s", where)
    if duration_s == 0:
        raise InputError(f"{where}: duration_s is 0")
    caption = record.get("caption")
    uri, problem = resolve(video, base)
    return Entry(
        line=line,
        video=video,
        uri=uri,
        start_s=start_s or 0.0,
        duration_s=duration_s,
        caption=caption.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if isinstance(caption, str)
        else "",
        split=split,
        events=_events(record.get("events"), where),
        problem=problem,
    )


def resolve(video: str, base: str) -> tuple[str, tuple[str, str] | None]:
    """(path or URI to open, why it must not be opened) of a manifest's `video`; `base` is the manifest's folder."""
    scheme, separator, _ = video.partition("://")
    if separator and scheme.lower() in STORAGE_SCHEMES:
        return video, None
    problem: str | None = None
    if separator or _SCHEME.match(video):
        problem = f"only paths under the manifest's folder and {', '.join(sorted(STORAGE_SCHEMES))} URIs are opened"
    elif "\0" in video:
        problem = "a path cannot hold a NUL"
    elif video.startswith("/"):
        problem = "an absolute path; give it relative to the manifest"
    elif os.path.normpath(video).split("/")[0] == "..":
        problem = "the path leaves the manifest's folder"
    if problem is not None:
        return video, ("bad_uri", problem)
    return f"{base}/{os.path.normpath(video)}", None


def _seconds(value: Any, name: str, where: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {name} '{value}' is not a number") from None
    if not math.isfinite(number) or number < 0:
        raise InputError(f"{where}: {name} is {number}; it must be 0 or more")
    return number


def _events(value: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    if value is None or value == "":
        return None
    try:
        events = json.loads(value) if isinstance(value, str) else value
        return tuple(_event(event) for event in events)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{where}: events must be a JSON list of objects with time_s, duration_s, kind, variant ({error!r})"
        ) from error


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    times = {name: float(event[name]) for name in ("time_s", "duration_s")}
    if not all(math.isfinite(t) for t in times.values()):
        raise ValueError("a time is not finite")
    return {**times, "kind": str(event["kind"]), "variant": str(event["variant"])}


def _walk(root: Path, follow: bool) -> Iterator[Path]:
    """Media files under `root` in a fixed order; with `follow` into linked folders too, each real folder once."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=follow):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            if PurePosixPath(name).suffix.lower() in MEDIA_SUFFIXES:
                yield Path(folder, name)


def _found(root: Path, path: Path, follow: bool) -> Entry:
    problem: tuple[str, str] | None = None
    try:
        mode = path.stat().st_mode
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
        if not stat.S_ISREG(mode):
            problem = ("not_media", "not a regular file")
        elif not inside and not follow:
            problem = ("bad_uri", "a link that leaves the folder; --follow allows it")
    except OSError as error:
        problem = ("missing", f"cannot be opened: {error.strerror}")
    return Entry(line=0, video=str(path.relative_to(root)), uri=str(path), problem=problem)
