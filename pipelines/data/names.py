"""Names from outside: what may be opened under which address, and which key a file's name gives.

Names are `str` with bytes that are not UTF-8 as surrogates, as Python gives them for the names of a file system;
Arrow columns hold them as the bytes they are.
"""

import os
import re
import unicodedata

MEDIA_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})
SOUND_SUFFIXES = frozenset({".wav", ".flac"})
"""Of files that may hold the sound of the video beside them."""
AUDIO_SUFFIXES = SOUND_SUFFIXES | {".mp3", ".ogg", ".oga", ".opus", ".m4a"}
"""Of files that hold sound alone."""
MAX_KEY_BYTES = 1024
"""Of an object's name on S3."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|subfile,")
_UNUSUAL = re.compile(r"\A/|\A[A-Za-z][A-Za-z0-9+.-]*:|\Asubfile,|\0|//|(?:\A|/)\.{1,2}(?:/|\Z)|/\Z")
_CUT_OUT = re.compile(r"(.{11})_([0-9]+)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


def escape(text: str) -> str:
    """NFC; everything that is not printable, and bytes that are not UTF-8, as %XX of their bytes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else "".join(f"%{b:02X}" for b in c.encode("utf-8", "surrogateescape"))
        for c in unicodedata.normalize("NFC", text)
    )


def suffix_of(name: str) -> str:
    """The last suffix of a file's name in lower case, with its dot; empty where there is none."""
    base = name[name.rfind("/") + 1 :]
    dot = base.rfind(".")
    return base[dot:].lower() if 0 < dot < len(base) - 1 else ""


def stem_of(name: str) -> str:
    """A path without folders and without the last suffix; a path that has no name is its own stem."""
    base = name.rstrip("/")
    base = base[base.rfind("/") + 1 :]
    dot = base.rfind(".")
    return (base[:dot] if 0 < dot < len(base) - 1 else base) or name


def clip_key(video: str) -> str:
    """The key of a file: its escaped stem."""
    return escape(stem_of(video)).replace("/", "%2F")


def start_padded(key: str) -> str:
    """The key with the start of a cut clip in six digits: `<11 characters of an id>_30` -> `<id>_000030`.

    The start stands after the last `_`; ids hold `_` themselves and may begin with `-`.
    """
    match = _CUT_OUT.fullmatch(key)
    return f"{match[1]}_{int(match[2]):06d}" if match else key


def resolve(video: str, base: str) -> tuple[str, tuple[str, str] | None]:
    """(path or URI to open, why it must not be opened) of a manifest's `video`; `base` is the manifest's folder."""
    if not _UNUSUAL.search(video):
        return f"{base}/{video}", None
    if video.startswith("s3://"):
        problem = _object_problem(video)
        return video, None if problem is None else ("bad_uri", problem)
    problem = None
    if "://" in video or _SCHEME.match(video):
        problem = "only paths under the manifest's folder and s3:// URIs are opened"
    elif "\0" in video:
        problem = "a path cannot hold a NUL"
    elif video.startswith("/"):
        problem = "an absolute path; give it relative to the manifest"
    elif os.path.normpath(video).split("/")[0] == "..":
        problem = "the path leaves the manifest's folder"
    elif os.path.normpath(video) == ".":
        problem = "the manifest's own folder"
    if problem is not None:
        return video, ("bad_uri", problem)
    return f"{base}/{os.path.normpath(video)}", None


def _object_problem(uri: str) -> str | None:
    """Why an s3:// URI names no object. What the store itself would refuse would end the job and not the clip."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        # Credentials before an @ too: they do not belong into a manifest.
        return "that is no bucket's name"
    if not key or "\0" in key or len(key.encode("utf-8", "surrogateescape")) > MAX_KEY_BYTES:
        return f"an object's key has 1 to {MAX_KEY_BYTES} bytes without NUL"
    if any("\udc80" <= c <= "\udcff" for c in key):
        return "an object's key is UTF-8"
    return None
