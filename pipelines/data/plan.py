"""Entries -> windows: which seconds of which file become which clip, as one sorted Arrow table.

Work is done on columns and in batches of rows, so that ten million windows are planned in minutes and some gigabytes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipelines.data.entries import BATCH_ROWS, Entries, file_codes, plain_row, text_of
from pipelines.data.names import clip_key, escape
from pipelines.errors import InputError

MAX_MISSING = 0.05
WINDOW_TOLERANCE_S = 0.001
CUT_S = 0.125
"""How exactly a cut is known: a survey looks at 8 pictures a second."""
WindowChoice = Literal["first", "all", "scenes"]
PLAN_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.large_string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        # What to open: a path or URI, and the bytes of it that are the file, where it is a member of a tar.
        pa.field("uri", pa.large_binary(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("size_bytes", pa.int64()),
        # What else to open: the file that holds the sound.
        pa.field("sound_uri", pa.large_binary()),
        pa.field("sound_offset", pa.int64()),
        pa.field("sound_size_bytes", pa.int64()),
        # The file's address for people, escaped; a tar's member as `<tar>!/<member>`.
        pa.field("source", pa.large_string(), nullable=False),
        # Start of the window in the file, seconds.
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("caption", pa.large_string(), nullable=False),
        # Known events of the whole file: JSON, times from the file's own start.
        pa.field("events", pa.large_string()),
        # Why no row can come of it; null: it has to be tried.
        pa.field("reason", pa.string()),
        pa.field("detail", pa.large_string()),
    ]
)
SURVEY_SCHEMA = pa.schema([PLAN_SCHEMA.field(name) for name in ("source", "uri", "offset", "size_bytes")])
_COPIED = (
    "split",
    "uri",
    "offset",
    "size_bytes",
    "sound_uri",
    "sound_offset",
    "sound_size_bytes",
    "caption",
    "events",
    "reason",
    "detail",
)


@dataclass(frozen=True, kw_only=True)
class FileSurvey:
    """What is known of a whole file before its windows are planned."""

    length_s: float | None = None
    """Seconds from its start to its end; None: it does not say."""
    cuts_s: tuple[float, ...] = ()
    """Ascending times of the scene cuts, seconds from its start: each the first looked at picture of a new shot, which
    begins at most `CUT_S` before it."""


@dataclass(frozen=True)
class _Windows:
    """Windows in the order of their entries."""

    rows: np.ndarray
    """int64 [W]: index of the entry."""
    starts_s: np.ndarray
    """float64 [W]."""
    problems: dict[int, tuple[str, str]]
    """(reason, detail) by index of the entry, where planning itself found one."""


def plan_windows(
    entries: Entries,
    *,
    clip_s: float,
    windows: WindowChoice = "first",
    hop_s: float | None = None,
    surveyed: Mapping[str, FileSurvey] | None = None,
    max_file_s: float | None = None,
) -> pa.Table:
    """One row a window, sorted by split and key.

    `first` takes one window from `start_s`; `all` every whole window at multiples of `hop_s` after it; `scenes` every
    whole window at multiples of `hop_s` after the start of each shot, none across a cut. A window may lack 5 % where
    the file ends, if it is the only one of the file or (`scenes`) of the last shot. A file without a known length
    gives one window, and its worker says what is wrong with it; one that is too short for any, one reject.

    Args:
        entries: what there is.
        clip_s: length of a window in seconds.
        windows: which windows.
        hop_s: seconds between the starts of windows (default: `clip_s`).
        surveyed: what is known of the files, by `source` (see `files_to_survey`); `first` needs nothing.
        max_file_s: length of a surveyed file from which it becomes one reject, `too_long`; None: any.

    Returns:
        A table of `PLAN_SCHEMA`.

    Raises:
        InputError: two entries give the same key; both are named.
    """
    table = entries.table
    sources = pa.concat_arrays(_sources(table))
    planned = _first_windows(table, clip_s)
    if windows != "first":
        planned = _refuse_long(planned, sources, surveyed or {}, max_file_s)
        planned = _more_windows(table, planned, sources, clip_s, hop_s or clip_s, windows == "scenes", surveyed or {})
    keys = _keys(table, planned)
    order = _checked_order(table, planned, keys)
    rows = pa.array(planned.rows[order])
    changed = _with_problems(table, planned.problems) if planned.problems else {}
    # Each in one piece: taking rows out of many chunks costs a search a row.
    columns = {name: changed.get(name, table[name]).combine_chunks().take(rows) for name in _COPIED}
    columns["clip_id"] = keys.take(pa.array(order))
    columns["source"] = sources.take(rows)
    columns["start_s"] = pa.array(planned.starts_s[order])
    return pa.table([columns[name] for name in PLAN_SCHEMA.names], schema=PLAN_SCHEMA)


def plan_row(plan: pa.Table, index: int) -> dict[str, Any]:
    """One row of a plan as plain values: names as `str`, events as a list of dictionaries."""
    return next(plan_rows(plan, index, index + 1))


def plan_rows(plan: pa.Table, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Rows `start` to `stop` (not included) of a plan as plain values; see `plan_row`."""
    for row in plan.slice(start, stop - start).to_pylist():
        yield plain_row(row)


def files_to_survey(entries: Entries) -> pa.Table:
    """Every file that has to be opened to plan `all` or `scenes`, once: a table of `SURVEY_SCHEMA` sorted by source.

    Raises:
        InputError: two files have one address when it is written in printable form.
    """
    table = entries.table.select(["uri", "member", "offset", "size_bytes", "reason"])
    files = table.append_column("source", pa.chunked_array(_sources(table)))
    files = files.filter(files["reason"].is_null()).group_by(["source", "uri", "offset", "size_bytes"]).aggregate([])
    files = files.select(SURVEY_SCHEMA.names).sort_by("source")
    names = files["source"].combine_chunks().to_pylist()
    twice = next((a for a, b in pairwise(names) if a == b), None)
    if twice is not None:
        raise InputError(f"two files are called '{twice}' in printable form; rename one")
    return files.cast(SURVEY_SCHEMA)


def _sources(table: pa.Table) -> list[pa.Array]:
    """The `source` of every entry."""
    found = []
    for batch in table.select(["uri", "member"]).to_batches(max_chunksize=BATCH_ROWS):
        pairs = zip(batch.column("uri").to_pylist(), batch.column("member").to_pylist(), strict=True)
        texts = [escape(text_of(uri if member is None else uri + b"!/" + member)) for uri, member in pairs]
        found.append(pa.array(texts, pa.large_string()))
    return found


def _first_windows(table: pa.Table, clip_s: float) -> _Windows:
    durations = table["duration_s"].to_numpy()
    is_known = table["reason"].is_valid().to_numpy()
    short = np.flatnonzero((durations < (1 - MAX_MISSING) * clip_s) & ~is_known)
    problems = {
        int(i): ("too_short", f"the manifest gives it {durations[i]:g} s, a clip takes {clip_s:g} s") for i in short
    }
    return _Windows(np.arange(table.num_rows), table["start_s"].to_numpy(), problems)


def _refuse_long(
    planned: _Windows, sources: pa.Array, surveyed: Mapping[str, FileSurvey], max_file_s: float | None
) -> _Windows:
    """The same, with a problem for every entry whose file is longer than allowed."""
    long = {source: s.length_s for source, s in surveyed.items() if max_file_s and (s.length_s or 0.0) > max_file_s}
    if not long:
        return planned
    problems = {
        row: ("too_long", f"{long[source]:.1f} s by its header, {max_file_s:g} s are allowed")
        for row, source in enumerate(sources.to_pylist())
        if source in long
    }
    return _Windows(planned.rows, planned.starts_s, {**problems, **planned.problems})


def _more_windows(
    table: pa.Table,
    first: _Windows,
    sources: pa.Array,
    clip_s: float,
    hop_s: float,
    scenes: bool,
    surveyed: Mapping[str, FileSurvey],
) -> _Windows:
    """Every window of every entry that can be opened, in the place of its first."""
    counts, starts, problems = [], [], dict(first.problems)
    columns = zip(
        sources.to_pylist(),
        table["start_s"].to_pylist(),
        table["duration_s"].to_pylist(),
        table["reason"].to_pylist(),
        strict=True,
    )
    unknown = FileSurvey()
    for row, (source, start_s, duration_s, reason) in enumerate(columns):
        found = [start_s]
        if reason is None and row not in problems:
            survey = surveyed.get(source, unknown)
            ends = [e for e in (survey.length_s, None if duration_s is None else start_s + duration_s) if e]
            if ends and scenes:
                shots = _shots(start_s, min(ends), survey.cuts_s)
                found = _scene_starts(shots, clip_s, hop_s)
                if not found:
                    detail = f"none of its {len(shots)} shots is as long as a clip, {clip_s:g} s"
                    found, problems[row] = [start_s], ("too_short", detail)
            elif ends:
                found = _starts(start_s, min(ends), clip_s, hop_s) or [start_s]
        counts.append(len(found))
        starts += found
    return _Windows(np.repeat(np.arange(len(counts)), counts), np.array(starts, dtype=np.float64), problems)


def _starts(start_s: float, end_s: float, clip_s: float, hop_s: float) -> list[float]:
    """Starts of the whole windows between two times."""
    count = math.floor((end_s - start_s - clip_s + WINDOW_TOLERANCE_S) / hop_s) + 1
    return [start_s + k * hop_s for k in range(count)]


def _shots(start_s: float, end_s: float, cuts_s: tuple[float, ...]) -> list[tuple[float, float]]:
    """(start, end) of every shot between two times."""
    inner = [cut for cut in cuts_s if start_s < cut < end_s]
    return list(zip([start_s, *inner], [*(cut - CUT_S for cut in inner), end_s], strict=True))


def _scene_starts(shots: list[tuple[float, float]], clip_s: float, hop_s: float) -> list[float]:
    """Starts of the windows inside shots. What the last one lacks is padded; any other would run across its cut."""
    found = [start for a, b in shots for start in _starts(a, b, clip_s, hop_s)]
    last, end_s = shots[-1]
    if not _starts(last, end_s, clip_s, hop_s) and end_s - last >= (1 - MAX_MISSING) * clip_s:
        found.append(last)
    return found


def _keys(table: pa.Table, planned: _Windows) -> pa.Array:
    """The key of every window: the stem, and the start in ms where the file gives more than one window."""
    files = file_codes(table)
    windows_of = np.bincount(files[planned.rows])
    found = []
    for begin in range(0, len(planned.rows), BATCH_ROWS):
        rows = planned.rows[begin : begin + BATCH_ROWS]
        is_one = windows_of[files[rows]] == 1
        starts_s = planned.starts_s[begin : begin + BATCH_ROWS].tolist()
        # Entries of one batch lie close together: in order, with repeats.
        low = int(rows[0])
        videos = table["video"].slice(low, int(rows[-1]) - low + 1).to_pylist()
        keys = [
            clip_key(text_of(videos[row - low])) + ("" if one else f"#{round(start * 1000)}")
            for row, one, start in zip(rows.tolist(), is_one.tolist(), starts_s, strict=True)
        ]
        found.append(pa.array(keys, pa.large_string()))
    return pa.concat_arrays(found)


def _checked_order(table: pa.Table, planned: _Windows, keys: pa.Array) -> np.ndarray:
    """int64 [W]: the windows sorted by split and key.

    Raises:
        InputError: a key occurs twice.
    """
    numbered = pa.table({"key": keys, "window": pa.array(np.arange(len(keys)))})
    ordered = numbered.sort_by([("key", "ascending"), ("window", "ascending")])
    order = ordered["window"].to_numpy()
    previous: str | None = None
    for batch in ordered.select(["key"]).to_batches(max_chunksize=BATCH_ROWS):
        names = batch.column("key").to_pylist()
        if previous in names[:1] or len(set(names)) < len(names):
            raise _same_key(table, planned, ordered)
        previous = names[-1]
    splits = table["split"].combine_chunks().dictionary_encode()
    rank = np.argsort(np.argsort(np.array(splits.dictionary.to_pylist())))
    return order[np.argsort(rank[splits.indices.to_numpy()][planned.rows[order]], kind="stable")]


def _same_key(table: pa.Table, planned: _Windows, ordered: pa.Table) -> InputError:
    """What to say of the first two windows with one key."""
    keys = ordered["key"].to_pylist()
    at = next(i for i in range(len(keys) - 1) if keys[i] == keys[i + 1])
    first, second = (_place(table, int(planned.rows[w])) for w in ordered["window"].slice(at, 2).to_pylist())
    return InputError(f"two entries give the key '{keys[at]}': {first} and {second}; rename one file, or take one out")


def _place(table: pa.Table, row: int) -> str:
    line, video = table["line"][row].as_py(), escape(text_of(table["video"][row].as_py()))
    return f"line {line} ({video})" if line else video


def _with_problems(table: pa.Table, problems: Mapping[int, tuple[str, str]]) -> dict[str, pa.ChunkedArray]:
    """The columns `reason` and `detail` with those that planning found."""
    columns = {}
    for place, name in enumerate(("reason", "detail")):
        values = table[name].to_pylist()
        for row, problem in problems.items():
            values[row] = problem[place]
        columns[name] = pa.chunked_array([pa.array(values, table.schema.field(name).type)])
    return columns
