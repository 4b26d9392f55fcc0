"""Lists of public corpora as they lie on disk: which clips there are, what they are called, to which split they belong.

A list names clips; the files lie in a folder of their own (see `listed_videos`). The format is told from the content.
Ids are read from the right, since ids of YouTube hold `_` and may begin with `-`. A start in a list is a position in
the original video: it is part of the file's name and is never used to seek.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from pipelines.data.entries import name_bytes
from pipelines.data.names import AUDIO_SUFFIXES, MEDIA_SUFFIXES, clip_key, escape, suffix_of
from pipelines.data.text_rows import check_header, open_text, text_rows
from pipelines.errors import InputError

_MAX_JSON_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class ListedClip:
    """One clip that a list names."""

    line: int
    """1-based line of the list, or item of its JSON."""
    stems: tuple[str, ...]
    """Stems that its file may have, best first."""
    caption: str = ""
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class ListFormat:
    """How the rows of one corpus's lists are read."""

    name: str
    num_columns: int
    parse: Callable[[Sequence[str]], ListedClip]
    """Fields of a row -> the clip (its line is set afterwards); raises ValueError."""
    header: tuple[str, ...] | None = None
    delimiter: str = ","
    padded: bool = False
    comments: bool = False
    """Lines that begin with # stand above the rows."""
    is_vggsound: bool = False
    """Its test clips overlap with VGG-SS."""


def _plain(name: str) -> str:
    """A file's name or an id -> its stem: of the suffixes only those of media are taken away."""
    suffix = suffix_of(name)
    return name[: -len(suffix)] if suffix in MEDIA_SUFFIXES | AUDIO_SUFFIXES else name


def _clip(stems: Sequence[str], caption: str = "", split: str | None = None) -> ListedClip:
    if not all(stem.strip() for stem in stems):
        raise ValueError("the id is empty")
    for stem in stems:
        if "\0" in stem or "/" in stem:
            raise ValueError(f"'{escape(stem)[:40]}' is not an id")
        # JSON can hold halves of characters, which are no name: a UnicodeEncodeError is a ValueError.
        name_bytes(stem)
    return ListedClip(line=0, stems=tuple(stems), caption=caption, split=split)


def _cut_stems(video_id: str, start: str) -> tuple[str, ...]:
    """`<id>_<start:06d>`; a start in a list is a whole number of seconds, written as 30 or 30.000."""
    try:
        whole = int(float(start))
    except (ValueError, OverflowError):
        raise ValueError(f"the start '{start[:30]}' is not a number") from None
    if not video_id.strip():
        raise ValueError("the id is empty")
    if whole < 0:
        raise ValueError(f"the start is {whole}; it must be 0 or more")
    return (f"{video_id}_{whole:06d}",)


def _vggsound(fields: Sequence[str]) -> ListedClip:
    video_id, start, label, split = fields
    if split not in ("train", "test"):
        raise ValueError(f"split '{split[:30]}' is neither train nor test")
    return _clip(_cut_stems(video_id, start), label, split)


def _audioset(fields: Sequence[str]) -> ListedClip:
    # Its labels are identifiers and no words (/m/09x0r): they make no caption.
    video_id, start, _, _ = fields
    return _clip((*_cut_stems(video_id, start), video_id))


def _audiocaps(fields: Sequence[str]) -> ListedClip:
    _, video_id, start, caption = fields
    return _clip((*_cut_stems(video_id, start), video_id), caption)


def _named(fields: Sequence[str]) -> ListedClip:
    name, caption = fields
    return _clip((_plain(name),), caption)


def _bare(fields: Sequence[str]) -> ListedClip:
    return _clip((_plain(fields[0].strip()),))


VGGSOUND = ListFormat(name="VGGSound csv", num_columns=4, parse=_vggsound, is_vggsound=True)
VGGSOUND_TEST = ListFormat(name="VGGSound test csv", num_columns=2, parse=_named, is_vggsound=True)
MMAUDIO = ListFormat(
    name="MMAudio tsv", num_columns=2, parse=_named, header=("id", "label"), delimiter="\t", is_vggsound=True
)
AUDIOCAPS = ListFormat(
    name="AudioCaps csv",
    num_columns=4,
    parse=_audiocaps,
    header=("audiocap_id", "youtube_id", "start_time", "caption"),
)
AV_BENCHMARK = ListFormat(name="av-benchmark csv", num_columns=2, parse=_named, header=("name", "caption"))
AUDIOSET = ListFormat(name="AudioSet csv", num_columns=4, parse=_audioset, padded=True, comments=True)
IDS = ListFormat(name="list of ids", num_columns=1, parse=_bare)
VGGSS = ListFormat(name="VGG-SS json", num_columns=1, parse=_bare)
LIST_FORMATS = (VGGSOUND, VGGSOUND_TEST, MMAUDIO, AUDIOCAPS, AV_BENCHMARK, AUDIOSET, IDS, VGGSS)


def sniff(path: Path, location: str) -> tuple[ListFormat | None, str]:
    """(format, delimiter) of a text list; no format for one of our own manifests.

    Raises:
        InputError: it is empty, or of no known kind.
    """
    with open_text(path, location) as file:
        first = next((line for line in file if line.strip()), "")
    if not first:
        raise InputError(f"{location} is empty; its first line must name the columns, 'video' among them")
    if first.lstrip().startswith(("[", "{")):
        return VGGSS, ","
    if first.startswith("#"):
        return AUDIOSET, ","
    delimiter = "\t" if suffix_of(location) == ".tsv" or "\t" in first.partition(",")[0] else ","
    with open_text(path, location) as file:
        _, fields = next(text_rows(file, location, delimiter))
    names = tuple(name.strip() for name in fields)
    return _format_of(names, delimiter, location), delimiter


def _format_of(names: tuple[str, ...], delimiter: str, location: str) -> ListFormat | None:
    """The format whose first row `names` is."""
    for known in (MMAUDIO, AUDIOCAPS, AV_BENCHMARK):
        if (names, delimiter) == (known.header, known.delimiter):
            return known
    if "video" not in names:
        if len(names) == 1 and delimiter == ",":
            return IDS
        if len(names) == 4 and names[3] in ("train", "test"):
            return VGGSOUND
        if len(names) == 2 and suffix_of(names[0]) in MEDIA_SUFFIXES and "_" in names[0]:
            return VGGSOUND_TEST
    check_header(names, location)
    return None


def read_list(path: Path, location: str, kind: ListFormat) -> Iterator[ListedClip]:
    """The clips of a list, in its order.

    Raises:
        InputError: a row cannot be parsed (with its line).
    """
    if kind is VGGSS:
        yield from _vggss_clips(path, location)
        return
    with open_text(path, location) as file:
        for line, fields in _rows(file, location, kind):
            if len(fields) != kind.num_columns:
                raise InputError(f"{location}, line {line}: {len(fields)} fields, a {kind.name} has {kind.num_columns}")
            try:
                clip = kind.parse(fields)
            except ValueError as error:
                raise InputError(f"{location}, line {line}: {error}") from error
            yield replace(clip, line=line)


def _rows(file: TextIO, location: str, kind: ListFormat) -> Iterator[tuple[int, Sequence[str]]]:
    if kind is IDS:
        # A whole line is an id: commas and quotes in it mean nothing.
        yield from ((line, [text.strip()]) for line, text in enumerate(file, start=1) if text.strip())
        return
    above = 0
    lines: Iterator[str] = file
    if kind.comments:
        for text in file:
            if text.strip() and not text.startswith("#"):
                lines = chain([text], file)
                break
            above += 1
    rows = text_rows(lines, location, kind.delimiter, line=above + 1, padded=kind.padded)
    if kind.header is not None:
        next(rows)
    yield from rows


def _vggss_clips(path: Path, location: str) -> Iterator[ListedClip]:
    """Items {file, class, bbox}; the file's name has no suffix."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise InputError(f"{location} is a JSON of more than {_MAX_JSON_BYTES} bytes; VGG-SS has some 2 MB")
    with open_text(path, location) as file:
        try:
            items: Any = json.load(file)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{location} is not JSON: {error}") from error
    if not isinstance(items, list):
        raise InputError(f"{location}: not a list of objects with 'file' and 'class', as vggss.json is")
    for index, item in enumerate(items, start=1):
        if not isinstance(item, dict) or not isinstance(item.get("file"), str):
            raise InputError(f"{location}, item {index}: not an object with the text 'file'")
        try:
            clip = _clip((_plain(item["file"]),), str(item.get("class") or ""))
        except ValueError as error:
            raise InputError(f"{location}, item {index}: {error}") from error
        yield replace(clip, line=index)


def keys_of(clip: ListedClip) -> Iterator[str]:
    """The clip keys that its file may have."""
    return (clip_key(f"{stem}.mp4") for stem in clip.stems)
