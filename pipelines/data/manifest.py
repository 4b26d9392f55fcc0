"""Our own manifests: csv, tsv or Parquet with `video` and optionally start_s, duration_s, caption, split, events.

A manifest is input from outside: a `video` that could name anything but a file under the manifest's folder, or an
object on known storage, becomes a reject before anything is opened; what cannot be parsed ends the job with its line.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from pipelines.data.contracts import SPLITS
from pipelines.data.entries import Entries, EntryBuilder, Piece, text_of
from pipelines.data.names import resolve
from pipelines.data.text_rows import check_header, parquet_rows, text_rows
from pipelines.errors import InputError

COLUMNS = ("video", "start_s", "duration_s", "caption", "split", "events")
KIND = "manifest"


def read_text_manifest(file: TextIO, location: str, delimiter: str, *, base: str, default_split: str) -> Entries:
    """Entries of a csv or tsv whose header names `video`.

    Args:
        file: the text, at its beginning.
        location: what to call the manifest.
        delimiter: between fields.
        base: folder that relative paths start from.
        default_split: of rows that say none.

    Raises:
        InputError: a row cannot be parsed (with its line), or there is none.
    """
    return _gather(_text_records(file, location, delimiter), location, base, default_split)


def read_parquet_manifest(path: Path, location: str, *, base: str, default_split: str) -> Entries:
    """Entries of a Parquet file with a column `video`; as `read_text_manifest`, with rows in the place of lines."""
    return _gather(parquet_rows(path, location, COLUMNS), location, base, default_split)


def _gather(records: Iterable[tuple[int, Mapping[str, Any]]], location: str, base: str, default_split: str) -> Entries:
    builder = EntryBuilder()
    for line, record in records:
        try:
            _add(builder, line, record, base, default_split)
        except ValueError as error:
            raise InputError(f"{location}, line {line}: {error}") from error
    return builder.finish(kind=KIND, location=location)


def _text_records(file: TextIO, location: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = text_rows(file, location, delimiter)
    header: list[str] = []
    for line, fields in rows:
        if not header:
            header = [name.strip() for name in fields]
            check_header(header, location)
        elif len(fields) != len(header):
            raise InputError(f"{location}, line {line}: {len(fields)} fields, the header has {len(header)}")
        else:
            yield line, dict(zip(header, fields, strict=True))


def _add(builder: EntryBuilder, line: int, record: Mapping[str, Any], base: str, default_split: str) -> None:
    video = record["video"]
    if isinstance(video, bytes):
        video = text_of(video)
    if not isinstance(video, str) or not video.strip():
        raise ValueError("'video' is empty")
    duration_s = parse_seconds(record.get("duration_s"), "duration_s")
    if duration_s == 0:
        raise ValueError("duration_s is 0")
    uri, problem = resolve(video, base)
    builder.add(
        line=line,
        video=video,
        piece=Piece(uri),
        start_s=parse_seconds(record.get("start_s"), "start_s") or 0.0,
        duration_s=duration_s,
        caption=parse_caption(record.get("caption")),
        split=parse_split(record.get("split"), default_split),
        events=parse_events(record.get("events")),
        problem=problem,
    )


def parse_caption(value: object) -> str:
    """A caption as given; empty for null and for the NaN by which tables say null.

    Raises:
        ValueError: it is not a text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        raise ValueError(f"the caption is {str(value)[:30]}, which is not a text")
    return value


def parse_split(value: object, default: str) -> str:
    """A split's name.

    Raises:
        ValueError: there is no such split.
    """
    split = value or default
    if split not in SPLITS:
        raise ValueError(f"split '{split}' is not one of {', '.join(SPLITS)}")
    return str(split)


def parse_seconds(value: Any, name: str) -> float | None:
    """Seconds, 0 or more; None where nothing is said.

    Raises:
        ValueError: it is not such a number.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} '{value}' is not a number") from None
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} is {number}; it must be 0 or more")
    return number


def parse_events(value: Any) -> str | None:
    """Events, as JSON or as values, in the canonical JSON of the `events` column; None where nothing is said.

    Raises:
        ValueError: they are not a list of objects with time_s, duration_s, kind, variant, or a time is not finite.
    """
    if value is None or value == "":
        return None
    try:
        events = json.loads(value) if isinstance(value, str) else value
        return json.dumps([_event(event) for event in events])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"events must be a JSON list of objects with time_s, duration_s, kind, variant ({error!r})"
        ) from error


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    times = {name: float(event[name]) for name in ("time_s", "duration_s")}
    if not all(math.isfinite(t) for t in times.values()):
        raise ValueError("a time is not finite")
    return {**times, "kind": str(event["kind"]), "variant": str(event["variant"])}
