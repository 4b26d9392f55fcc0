"""WebDataset shards: the members of uncompressed tars as entries, found by reading headers alone.

Nothing is extracted: a member is a range of bytes, its name a mere name. Members of one sample share their name up to
the first dot; they may lie in any order. A shard is hostile until shown otherwise: what cannot be used becomes a
reject with its reason, and where a tar breaks off one more reject says that members may be lost.
"""

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipelines.data.entries import EntryBuilder, FoundFile, Piece
from pipelines.data.manifest import parse_caption, parse_events, parse_seconds, parse_split
from pipelines.data.names import AUDIO_SUFFIXES, MEDIA_SUFFIXES, SOUND_SUFFIXES, suffix_of
from pipelines.data.storage import Folder
from pipelines.errors import EnvironmentFailed, InputError

TAR_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = frozenset({".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst"})
NUM_THREADS = 8
BUFFER_BYTES = 1 << 16
"""Read at once around a header: on object storage one request, which also brings the small members that follow."""
MAX_SIDECAR_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20
_BLOCK_BYTES = tarfile.BLOCKSIZE
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_LINK_DETAIL = "a link inside a tar; store the file itself"
_TWICE_DETAIL = "the tar holds this name twice, and which one is meant is not clear"


@dataclass(kw_only=True)
class _Member:
    """One member: where its bytes lie, or why they cannot be used."""

    name: str
    offset: int
    size_bytes: int
    problem: tuple[str, str] | None = None
    content: bytes = b""
    """Of captions and descriptions."""


@dataclass(kw_only=True)
class _Scan:
    """What the headers of one tar say."""

    media_suffixes: frozenset[str] = MEDIA_SUFFIXES
    media: dict[str, _Member] = field(default_factory=dict)
    beside: dict[tuple[str, str], _Member] = field(default_factory=dict)
    """By name without suffix and suffix."""
    problem: tuple[str, str] | None = None
    """Why there may be members that were not seen."""


class _HeaderReader(io.BufferedReader):
    """A file of which no header is believed that it is larger than a header can be."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header says that it is {size} bytes long")
        return super().read(size)


def refuse_compressed(names: Sequence[str]) -> None:
    """Stop at compressed tars, whose members cannot be read by themselves.

    Raises:
        InputError: one of the names is one's.
    """
    for name in names:
        suffix = suffix_of(name)
        if suffix in COMPRESSED_SUFFIXES and (suffix.startswith(".t") or suffix_of(name[: -len(suffix)]) == TAR_SUFFIX):
            raise InputError(f"{name} is compressed, so that no member can be read by itself; unpack it to a .tar")


def add_tars(
    builder: EntryBuilder, folder: Folder, tars: Sequence[FoundFile], default_split: str, audio_only: bool = False
) -> None:
    """Add the media members of tars: several tars at a time, rows in the order of `tars` and of their members.

    Args:
        builder: takes the rows.
        folder: where the tars lie.
        tars: their names in the folder and their URIs; one with a problem becomes a reject.
        default_split: of members whose .json says none.
        audio_only: members of sound alone are media too; .wav and .flac only with no video beside them.

    Raises:
        InputError: a tar is compressed.
        EnvironmentFailed: storage fails after retries.
    """
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for rows in pool.map(lambda tar: list(_tar_rows(folder, tar, default_split, audio_only)), tars):
            for row in rows:
                builder.add(**row)


def _tar_rows(folder: Folder, tar: FoundFile, default_split: str, audio_only: bool) -> Iterator[dict[str, Any]]:
    """Arguments of `EntryBuilder.add` for every media member of a tar, and for what is lost of it."""
    scan = _Scan(problem=tar.problem)
    if tar.problem is None:
        scan = _scan_tar(folder, tar.name, audio_only)
    for member in scan.media.values():
        yield {
            "line": 0,
            "video": f"{tar.name}!/{member.name}",
            "member": member.name,
            "piece": Piece(tar.uri, member.offset, member.size_bytes),
            **_described(member, scan, tar.uri, default_split),
        }
    if scan.problem is not None:
        rest = f"rest-of-{posixpath.basename(tar.name)}"
        yield {
            "line": 0,
            "video": f"{tar.name}!/{rest}",
            "member": rest,
            "piece": Piece(tar.uri),
            "split": default_split,
            "problem": scan.problem,
        }


def _scan_tar(folder: Folder, name: str, audio_only: bool) -> _Scan:
    try:
        if folder.is_local:
            # Python's own file: Arrow cannot say a name that is not UTF-8.
            with _HeaderReader(io.FileIO(f"{folder.path}/{name}"), BUFFER_BYTES) as file:
                return _scan(file, name, audio_only)
        return folder.use_file(name, lambda file: _scan(_HeaderReader(file, BUFFER_BYTES), name, audio_only))  # pyright: ignore[reportArgumentType]
    except FileNotFoundError:
        return _Scan(problem=("missing", "the tar is gone"))
    except OSError as error:
        raise EnvironmentFailed(f"{folder.uri}/{name}: {error}; run the same command again") from error


def _scan(file: _HeaderReader, name: str, audio_only: bool) -> _Scan:
    scan = _scan_members(file, name, audio_only)
    if audio_only:
        _take_sounds_alone(scan)
    return scan


def _scan_members(file: _HeaderReader, name: str, audio_only: bool) -> _Scan:
    scan = _Scan(media_suffixes=MEDIA_SUFFIXES | (AUDIO_SUFFIXES - SOUND_SUFFIXES) if audio_only else MEDIA_SUFFIXES)
    total_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(min(_BLOCK_BYTES, total_bytes))
    if start.startswith(_COMPRESSED_MAGIC):
        raise InputError(f"{name} is compressed, so that no member can be read by itself; unpack it to a .tar")
    if not start:
        scan.problem = ("empty", "a tar of 0 bytes")
        return scan
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                # tarfile itself would follow a negative size backwards, for ever.
                if info.size < 0 or tar.offset <= end:
                    raise tarfile.ReadError("a member of negative size")
                end = tar.offset
                _take(scan, file, info, total_bytes)
                # Nothing more is needed of a member already taken: the list inside would grow with the tar.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                if end > total_bytes:
                    break
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, IndexError) as error:
        kind = "truncated" if end else "not_media"
        scan.problem = (kind, f"no tar beyond byte {end}: {error}"[:200])
        return scan
    is_cut = any(member.problem and member.problem[0] == "truncated" for member in scan.media.values())
    if scan.problem is None and not is_cut:
        file.seek(min(end, total_bytes))
        if end > total_bytes or file.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
            scan.problem = ("truncated", f"no member and no end mark at byte {end}; members after it are lost")
    return scan


def _take(scan: _Scan, file: _HeaderReader, info: tarfile.TarInfo, total_bytes: int) -> None:
    """File one member under its name; of captions and descriptions the content too."""
    suffix = suffix_of(info.name)
    is_media = suffix in scan.media_suffixes
    cut_bytes = info.offset_data + info.size - total_bytes if info.isreg() else 0
    if cut_bytes > 0 and not is_media:
        scan.problem = ("truncated", f"the tar ends {cut_bytes} bytes before the end of '{info.name}'")
    if info.isdir() or not (is_media or suffix in SOUND_SUFFIXES or suffix in (".txt", ".json")):
        return
    name = info.name if _leaves(info.name) else posixpath.normpath(info.name)
    member = _Member(name=name, offset=info.offset_data, size_bytes=info.size, problem=_member_problem(info, cut_bytes))
    if member.problem is None and suffix in (".txt", ".json"):
        if info.size > MAX_SIDECAR_BYTES:
            member.problem = ("too_large", f"its {suffix} has {info.size} bytes, more than {MAX_SIDECAR_BYTES}")
        else:
            file.seek(info.offset_data)
            member.content = file.read(info.size)
    if is_media:
        known = scan.media.setdefault(name, member)
    else:
        known = scan.beside.setdefault((name[: -len(suffix)], suffix), member)
    if known is not member:
        known.problem = known.problem or ("bad_uri", _TWICE_DETAIL)


def _take_sounds_alone(scan: _Scan) -> None:
    """Sounds with no video beside them become media; of one stem the one that a video would have taken."""
    claimed = {stem for name in scan.media for stem in _stems_beside(name)}
    taken: set[str] = set()
    for suffix in sorted(SOUND_SUFFIXES, reverse=True):
        for stem in [stem for stem, found in scan.beside if found == suffix and stem not in claimed]:
            member = scan.beside.pop((stem, suffix))
            if stem not in taken:
                scan.media[member.name] = member
                taken.add(stem)


def _stems_beside(name: str) -> tuple[str, str]:
    """How what lies beside a member may be called: its name without the last suffix, then WebDataset's key."""
    # An id may hold dots itself.
    folder, slash, base = name.rpartition("/")
    return name[: -len(suffix_of(name))], f"{folder}{slash}{base.partition('.')[0]}"


def _leaves(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


def _member_problem(info: tarfile.TarInfo, cut_bytes: int) -> tuple[str, str] | None:
    if _leaves(info.name):
        return "bad_uri", "a member whose name leaves the tar"
    if info.issym() or info.islnk():
        return "bad_uri", _LINK_DETAIL
    if not info.isreg() or info.issparse():
        return "not_media", "a member that is no plain file"
    if cut_bytes > 0:
        return "truncated", f"the tar ends {cut_bytes} bytes before the end of this member"
    return None


def _described(member: _Member, scan: _Scan, uri: str, default_split: str) -> dict[str, Any]:
    """Caption, split, times, sound and problem of a media member, from what lies beside it."""

    def beside(suffix: str) -> _Member | None:
        names = _stems_beside(member.name)
        return next((scan.beside[name, suffix] for name in names if (name, suffix) in scan.beside), None)

    text, description = beside(".txt"), beside(".json")
    sounds = [sound for sound in map(beside, sorted(SOUND_SUFFIXES, reverse=True)) if sound is not None]
    problem = member.problem
    for other in (text, description, *sounds[:1]):
        if problem is None and other is not None and other.problem is not None:
            problem = (other.problem[0], f"{posixpath.basename(other.name)} beside it: {other.problem[1]}")
    found: dict[str, Any] = {"split": default_split}
    if problem is None and description is not None:
        try:
            found = _from_json(description.content, default_split)
        except (ValueError, RecursionError) as error:
            problem = ("not_media", f"{posixpath.basename(description.name)} beside it: {error}"[:200])
    if text is not None:
        found["caption"] = text.content.decode("utf-8-sig", "replace").strip()
    sound = Piece(uri, sounds[0].offset, sounds[0].size_bytes) if sounds and problem is None else None
    return {**found, "sound": sound, "problem": problem}


def _from_json(content: bytes, default_split: str) -> dict[str, Any]:
    """What of a sample's description concerns us; everything else in it is left alone."""
    said = json.loads(content.decode("utf-8-sig", "replace"))
    if not isinstance(said, dict):
        raise ValueError("not a JSON object")
    duration_s = parse_seconds(said.get("duration_s"), "duration_s")
    if duration_s == 0:
        raise ValueError("duration_s is 0")
    return {
        "caption": parse_caption(said.get("caption")),
        "split": parse_split(said.get("split"), default_split),
        "start_s": parse_seconds(said.get("start_s"), "start_s") or 0.0,
        "duration_s": duration_s,
        "events": parse_events(said.get("events")),
    }
