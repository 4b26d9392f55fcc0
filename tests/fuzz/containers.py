"""Where the fields of a container lie: sizes, times, picture sizes, tables and codec set-ups, as byte ranges.

Three small walkers (ISO boxes, EBML, RIFF) that never fail: what they do not understand has no fields.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["size", "time", "geometry", "table", "config", "name"]
KINDS: tuple[Kind, ...] = ("size", "time", "geometry", "table", "config", "name")
MAX_FIELDS = 4000
"""Of one file; a walker stops there."""

BOX_PARENTS = frozenset(b"moov trak mdia minf stbl edts mvex moof traf udta dinf".split())
BOX_WORDS: dict[bytes, Kind] = {
    **dict.fromkeys((b"mvhd", b"mdhd", b"tkhd", b"stts", b"ctts", b"elst", b"tfdt", b"tfhd", b"trun", b"mehd"), "time"),
    **dict.fromkeys((b"stsz", b"stco", b"co64", b"stsc", b"stss", b"trex", b"sidx", b"mfhd", b"tfra"), "table"),
}
EBML_PARENTS = frozenset(
    {0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0xE1, 0x1F43B675, 0xA0, 0x1C53BB6B, 0xBB, 0xB7}
    | {0x114D9B74, 0x4DBB}
)
EBML_LEAVES: dict[int, Kind] = {
    **dict.fromkeys((0xE7, 0x4489, 0x2AD7B1, 0x23E383, 0x56AA, 0x56BB, 0xB3, 0x9B), "time"),
    **dict.fromkeys((0xB0, 0xBA, 0x54B0, 0x54BA, 0xB5, 0x9F, 0x6264), "geometry"),
    **dict.fromkeys((0xF1, 0xF0, 0xD7, 0x53AC, 0x53AB, 0x83), "table"),
    0x86: "config",
}
EBML_CODEC_SETUP = 0x63A2
EBML_BLOCKS = (0xA3, 0xA1)
RIFF_PARENTS = (b"RIFF", b"LIST")


@dataclass(frozen=True)
class Field:
    """Bytes that mean something."""

    kind: Kind
    offset: int
    length: int
    little: bool = False
    """Least significant byte first."""


def fields_of(content: bytes) -> list[Field]:
    """The fields of a file of a known container; none of another."""
    if content[:4] == b"\x1aE\xdf\xa3":
        walk = _ebml(content, 0, len(content))
    elif content[:4] == b"RIFF":
        walk = _riff(content, 0, len(content))
    elif content[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide"):
        walk = _boxes(content, 0, len(content))
    else:
        return []
    return [field for field, _ in zip(walk, range(MAX_FIELDS), strict=False)]


def body_offset(content: bytes) -> int:
    """Where the header ends and the coded material begins; the middle where that cannot be told."""
    for mark in (b"mdat", b"\x1fC\xb6u", b"movi"):
        found = content.find(mark)
        if found > 4:
            return found - 4 if mark == b"mdat" else found
    return len(content) // 2


def _boxes(content: bytes, start: int, end: int) -> Iterator[Field]:
    position = start
    while position + 8 <= end:
        size = int.from_bytes(content[position : position + 4], "big")
        name = content[position + 4 : position + 8]
        yield Field("size", position, 4)
        yield Field("name", position + 4, 4)
        stop = min(position + size, end) if size >= 8 else end
        if name in BOX_PARENTS:
            yield from _boxes(content, position + 8, stop)
        elif name == b"stsd":
            yield from _sample_description(content, position, stop)
        elif name in BOX_WORDS:
            words = range(position + 8, stop - 3, 4)
            yield from (Field(BOX_WORDS[name], at, 4) for at in words)
            if name == b"tkhd":
                yield from (Field("geometry", at, 4) for at in range(max(stop - 44, position + 8), stop - 3, 4))
        position = stop


def _sample_description(content: bytes, position: int, stop: int) -> Iterator[Field]:
    """The first entry: 16 bytes of its own, then picture size or channels and rate, then boxes of the codec."""
    entry = position + 16
    yield Field("table", position + 12, 4)
    yield Field("size", entry, 4)
    yield Field("name", entry + 4, 4)
    yield from (Field("geometry", at, 2) for at in range(entry + 24, min(entry + 36, stop - 1), 2))
    yield from (Field("config", at, 1) for at in range(entry + 36, stop))


def _number(content: bytes, position: int, *, keep_mark: bool) -> tuple[int, int]:
    """(value, length) of an EBML variable-length integer; length 0 where there is none."""
    first = content[position] if position < len(content) else 0
    length = 9 - first.bit_length() if first else 0
    if not length or position + length > len(content):
        return 0, 0
    value = int.from_bytes(content[position : position + length], "big")
    return value if keep_mark else value & ((1 << 7 * length) - 1), length


def _ebml(content: bytes, start: int, end: int) -> Iterator[Field]:
    position = start
    while position < end:
        name, name_bytes = _number(content, position, keep_mark=True)
        size, size_bytes = _number(content, position + name_bytes, keep_mark=False)
        if not name_bytes or not size_bytes:
            return
        payload = position + name_bytes + size_bytes
        unknown = size == (1 << 7 * size_bytes) - 1
        stop = end if unknown else min(payload + size, end)
        yield Field("name", position, name_bytes)
        yield Field("size", position + name_bytes, size_bytes)
        if name in EBML_PARENTS:
            yield from _ebml(content, payload, stop)
        elif name in EBML_LEAVES and stop > payload:
            yield Field(EBML_LEAVES[name], payload, stop - payload)
        elif name == EBML_CODEC_SETUP:
            yield from (Field("config", at, 1) for at in range(payload, stop))
        elif name in EBML_BLOCKS and stop - payload > 4:
            yield Field("table", payload, 1)
            yield Field("time", payload + 1, 2)
            yield Field("table", payload + 3, 1)
        position = stop


def _riff(content: bytes, start: int, end: int) -> Iterator[Field]:
    position = start
    while position + 8 <= end:
        name = content[position : position + 4]
        payload = position + 8
        stop = min(payload + int.from_bytes(content[position + 4 : payload], "little"), end)
        yield Field("name", position, 4)
        yield Field("size", position + 4, 4, little=True)
        if name in RIFF_PARENTS:
            yield Field("name", payload, 4)
            yield from _riff(content, payload + 4, stop)
        else:
            yield from _riff_words(name, payload, stop)
        position = stop + stop % 2


def _riff_words(name: bytes, payload: int, stop: int) -> Iterator[Field]:
    kinds: dict[bytes, Kind] = {b"strh": "time", b"avih": "time", b"idx1": "table", b"fact": "time"}
    if name in (b"strf", b"fmt "):
        yield from (Field("geometry", at, 2, little=True) for at in range(payload, min(payload + 24, stop - 1), 2))
        yield from (Field("config", at, 1) for at in range(payload + 16, stop))
    elif name in kinds:
        yield from (Field(kinds[name], at, 4, little=True) for at in range(payload, stop - 3, 4))
        if name == b"avih":
            yield from (Field("geometry", at, 4, little=True) for at in range(payload + 32, stop - 3, 4))
