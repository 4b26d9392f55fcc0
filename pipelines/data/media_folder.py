"""Folders of videos, local or on object storage: one listing, hostile entries refused without being opened."""

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from pipelines.data.entries import Entries, EntryBuilder, FoundFile, Piece
from pipelines.data.names import AUDIO_SUFFIXES, MEDIA_SUFFIXES, suffix_of
from pipelines.data.storage import open_folder
from pipelines.data.webdataset import COMPRESSED_SUFFIXES, TAR_SUFFIX, add_tars, refuse_compressed
from pipelines.errors import InputError

KIND = "folder"


def list_videos(
    location: str, *, follow: bool = False, default_split: str = "train", audio_only: bool = False
) -> Entries:
    """All media files under a folder, by suffix, recursively, and the members of its tars; or those of one tar.

    Args:
        location: path or URI of a folder or of an uncompressed .tar.
        follow: take links that leave the folder too, and go into linked folders.
        default_split: of what says none.
        audio_only: files of sound alone are media too.

    Raises:
        InputError: no such folder or tar, or no media file in it.
    """
    place = location.rstrip("/") if "://" in location else str(Path(location).absolute())
    builder = EntryBuilder()
    if suffix_of(place) in (TAR_SUFFIX, *COMPRESSED_SUFFIXES) and not Path(place).is_dir():
        parent, _, name = place.rpartition("/")
        refuse_compressed([name])
        if open_folder(parent).size_bytes(name) is None:
            raise InputError(f"--videos {location} does not exist or is not a file")
        add_tars(builder, open_folder(parent), [FoundFile(name, place, None)], default_split, audio_only)
        return builder.finish(kind=KIND, location=location)
    suffixes = MEDIA_SUFFIXES | AUDIO_SUFFIXES if audio_only else MEDIA_SUFFIXES
    found = list(list_files(location, suffixes | COMPRESSED_SUFFIXES | {TAR_SUFFIX}, follow=follow))
    tars = [file for file in found if suffix_of(file.name) == TAR_SUFFIX]
    media = [file for file in found if suffix_of(file.name) in suffixes]
    if tars or not media:
        # Beside loose files it is an archive of whatever kind; among shards, or alone, it is a part of the corpus.
        refuse_compressed([file.name for file in found])
    for name, uri, problem in media:
        builder.add(line=0, video=name, piece=Piece(uri), split=default_split, problem=problem)
    if tars:
        add_tars(builder, open_folder(location), tars, default_split, audio_only)
    return builder.finish(kind=KIND, location=location)


def list_files(location: str, suffixes: Collection[str], *, follow: bool = False) -> Iterator[FoundFile]:
    """Files under a folder with one of `suffixes`, recursively, in the order of their names in each folder.

    Raises:
        InputError: there is no such folder, or it cannot be read.
        EnvironmentFailed: storage fails after retries.
    """
    folder = open_folder(location)
    if not folder.is_local:
        for name in folder.list_infos(recursive=True):
            if suffix_of(name) in suffixes:
                yield FoundFile(name, f"{folder.uri}/{name}", None)
        return
    root = Path(folder.path)
    if not root.is_dir():
        raise InputError(f"--videos {location} is not a folder")
    real_root = os.path.realpath(root)
    for name, is_plain in _walk(str(root), suffixes, follow):
        path = f"{root}/{name}"
        yield FoundFile(name, path, None if is_plain else _problem(path, real_root, follow))


def _walk(root: str, suffixes: Collection[str], follow: bool) -> Iterator[tuple[str, bool]]:
    """(path under `root`, whether it is a regular file and no link); each real folder once."""
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            status = Path(root, below).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(f"{root}/{below}") as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            # Passing it over would lose clips without a word.
            raise InputError(
                f"{root}/{below} cannot be listed ({error.strerror}); make it readable or move it"
            ) from error
        folders = []
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{below}{entry.name}/")
            elif entry.is_symlink() and Path(entry.path).is_dir():
                folders += [f"{below}{entry.name}/"] if follow else []
            elif suffix_of(entry.name) in suffixes:
                yield f"{below}{entry.name}", entry.is_file(follow_symlinks=False)
        waiting += reversed(folders)


def _problem(path: str, real_root: str, follow: bool) -> tuple[str, str] | None:
    """Why a link, or what is not a file, must not be opened."""
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        return "missing", f"cannot be opened: {error.strerror}"
    if not stat.S_ISREG(mode):
        return "not_media", "not a regular file"
    if not follow and not Path(os.path.realpath(path)).is_relative_to(real_root):
        return "bad_uri", "a link that leaves the folder; --follow allows it"
    return None
