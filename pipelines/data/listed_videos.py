"""A foreign list and the folder that holds its files -> entries: each clip found by its stem, or missing."""

from collections.abc import Iterable
from typing import NamedTuple

from pipelines.data.corpus_lists import ListedClip, ListFormat, keys_of
from pipelines.data.entries import Entries, EntryBuilder, FoundFile, Piece
from pipelines.data.media_folder import list_files
from pipelines.data.names import (
    AUDIO_SUFFIXES,
    MEDIA_SUFFIXES,
    SOUND_SUFFIXES,
    clip_key,
    escape,
    start_padded,
    suffix_of,
)
from pipelines.data.storage import open_folder
from pipelines.errors import InputError


class _Match(NamedTuple):
    """The file of a clip, and the sound beside it."""

    file: FoundFile
    sound: FoundFile | None
    other: FoundFile | None
    """A second file of the same stem."""


class _Shelf:
    """The files of a folder by the clip keys that lists may give them."""

    def __init__(self, files: Iterable[FoundFile], *, audio_only: bool) -> None:
        """`audio_only`: a sound with no video beside it is a file of its own."""
        self._media: dict[str, FoundFile] = {}
        self._second: dict[str, FoundFile] = {}
        self._sounds: dict[str, FoundFile] = {}
        self._padded: dict[str, str] = {}
        for file in files:
            suffix = suffix_of(file.name)
            if suffix in SOUND_SUFFIXES:
                # .flac comes before .wav in a listing, and it is lossless too: the first stays.
                self._sounds.setdefault(file.name[: -len(suffix)], file)
            else:
                self._add(file)
        if audio_only:
            claimed = {_without_suffix(file) for file in self._media.values()}
            for stem in [stem for stem in self._sounds if stem not in claimed]:
                self._add(self._sounds.pop(stem))

    def _add(self, file: FoundFile) -> None:
        key = clip_key(file.name)
        if self._media.setdefault(key, file) is not file:
            self._second.setdefault(key, file)
        elif (padded := start_padded(key)) != key:
            self._padded.setdefault(padded, key)

    def find(self, clip: ListedClip) -> _Match | None:
        """The file of a clip; None: there is none."""
        for key in keys_of(clip):
            padded = start_padded(key)
            own = next((k for k in (key, padded) if k in self._media), self._padded.get(padded))
            if own is not None:
                file = self._media[own]
                sound = self._sounds.get(_without_suffix(file))
                return _Match(file, sound, self._second.get(own))
        return None


def _without_suffix(file: FoundFile) -> str:
    return file.name[: -len(suffix_of(file.name))]


def locate(
    clips: Iterable[ListedClip],
    kind: ListFormat,
    location: str,
    *,
    videos: str,
    default_split: str,
    follow: bool,
    audio_only: bool = False,
) -> Entries:
    """Entries of the clips of a list whose files lie under `videos`, found by one listing.

    Of several rows that name one file the first stays, with its caption; the others count as repeats (AudioCaps gives
    five captions to a clip of its val and test).

    Args:
        clips: what the list names.
        kind: the list's format.
        location: what to call the list.
        videos: path or URI of the folder.
        default_split: of clips whose list says none.
        follow: take links that leave the folder too.
        audio_only: take files of sound alone too.

    Raises:
        InputError: the list or the folder is empty, or none of the clips is there.
    """
    suffixes = MEDIA_SUFFIXES | (AUDIO_SUFFIXES if audio_only else SOUND_SUFFIXES)
    shelf = _Shelf(list_files(videos, suffixes, follow=follow), audio_only=audio_only)
    base = open_folder(videos).uri
    builder = EntryBuilder()
    for clip in clips:
        split = clip.split or default_split
        match = shelf.find(clip)
        if match is None:
            name = f"{clip.stems[0]}.mp4"
            gone = ("missing", "no file of this stem in the folder of the videos")
            piece = Piece(f"{base}/{name}")
            builder.add(line=clip.line, video=name, piece=piece, caption=clip.caption, split=split, problem=gone)
            continue
        builder.add(
            line=clip.line,
            video=match.file.name,
            piece=Piece(match.file.uri),
            sound=None if match.sound is None else Piece(match.sound.uri),
            caption=clip.caption,
            split=split,
            problem=_problem(match),
        )
    entries = builder.finish(kind=kind.name, location=location)
    if entries.num_missing == entries.table.num_rows:
        raise InputError(
            f"{location}: none of its {entries.num_missing} clips lies under {videos}, "
            f"{', '.join(entries.missing_names(3))} among them; give the folder that holds them"
        )
    return entries


def _problem(match: _Match) -> tuple[str, str] | None:
    if match.other is not None:
        names = f"'{escape(match.file.name)}' and '{escape(match.other.name)}'"
        return "bad_uri", f"two files have this stem: {names}; take one out"
    if match.file.problem is None and match.sound is not None and match.sound.problem is not None:
        reason, detail = match.sound.problem
        return reason, f"'{escape(match.sound.name)}' beside it: {detail}"
    return match.file.problem
