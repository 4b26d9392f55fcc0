"""Names from outside: what may be opened under which address, and which key a file's name gives.

Names are `str` with bytes that are not UTF-8 as surrogates, as Python gives them for the names of a file system;
Arrow columns hold them as the bytes they are.
"""

import os
import re
import unicodedata
from urllib.parse import quote

MEDIA_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})
SOUND_SUFFIXES = frozenset({".wav", ".flac"})
STORAGE_SCHEMES = frozenset({"s3", "gs", "gcs", "hdfs", "abfs", "abfss"})
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|subfile,")
_UNUSUAL = re.compile(r"\A/|\A[A-Za-z][A-Za-z0-9+.-]*:|\Asubfile,|\0|//|(?:\A|/)\.{1,2}(?:/|\Z)|/\Z")
_CUT_OUT = re.compile(r"(.{11})_([0-9]+)", re.DOTALL)
# What a URI may hold as it stands; `?` would begin options, `#` would cut the name short.
_URI_SAFE = "/!$&'()*+,;=:@~"


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


def child_uri(base: str, name: str) -> str:
    """Path or URI of `name` under the folder `base`; in a URI what the name cannot hold plainly is percent-encoded.

    Options of the base (`?...`, the operator's own) stay at the end.
    """
    if "://" not in base:
        return f"{base}/{name}"
    place, mark, options = base.partition("?")
    return f"{place.rstrip('/')}/{quote(name, safe=_URI_SAFE, errors='surrogateescape')}{mark}{options}"


def resolve(video: str, base: str) -> tuple[str, tuple[str, str] | None]:
    """(path or URI to open, why it must not be opened) of a manifest's `video`; `base` is the manifest's folder."""
    if not _UNUSUAL.search(video):
        return child_uri(base, video), None
    scheme, separator, _ = video.partition("://")
    if separator and scheme.lower() in STORAGE_SCHEMES:
        return _stored(video)
    problem: str | None = None
    if separator or _SCHEME.match(video):
        problem = f"only paths under the manifest's folder and {', '.join(sorted(STORAGE_SCHEMES))} URIs are opened"
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
    return child_uri(base, os.path.normpath(video)), None


def _stored(uri: str) -> tuple[str, tuple[str, str] | None]:
    """An object's URI made fit to be opened. Its options could name another server, and credentials, so it has none."""
    place = uri.partition("://")[2]
    problem: str | None = None
    if "?" in uri:
        problem = "a URI of a manifest takes no options (?...); a key's question mark is written %3F"
    elif "@" in place.partition("/")[0]:
        problem = "credentials do not belong into a manifest"
    elif "\0" in uri or any("\udc80" <= c <= "\udcff" for c in uri):
        problem = "the key of an object is UTF-8 without NUL"
    if problem is not None:
        return uri, ("bad_uri", problem)
    # Blanks, `#` and letters beyond ASCII are written plainly by people; `%20` stays what it is.
    plain = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", uri)
    return quote(plain, safe=_URI_SAFE + "%"), None
