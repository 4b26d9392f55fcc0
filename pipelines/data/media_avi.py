"""AVI has no time stamps: FFmpeg counts chunks, and behind a damaged one the count is wrong. The index knows better.

Part of the reader (`media.py`).
"""

from collections.abc import Sequence
from fractions import Fraction

from av.packet import Packet
from av.stream import Stream

CHUNK_HEADER_BYTES = 8


class AviPlaces:
    """Where the chunks of a stretch of time lie by the file's own index."""

    def __init__(self, streams: Sequence[Stream], start_s: Fraction, end_s: Fraction) -> None:
        """Copied before anything is read: reading adds to FFmpeg's index what it wrongly counts."""
        self._places = {stream.index: _places(stream, start_s, end_s) for stream in streams}

    def is_displaced(self, packet: Packet) -> bool:
        """Whether the index has another place for the chunk of the packet's time; False where it has none."""
        place = self._places.get(packet.stream_index, {}).get(packet.dts)
        return place is not None and packet.pos is not None and place + CHUNK_HEADER_BYTES != packet.pos


def _places(stream: Stream, start_s: Fraction, end_s: Fraction) -> dict[int | None, int]:
    places: dict[int | None, int] = {}
    if stream.time_base is None:
        return places
    index, last = stream.index_entries, end_s / stream.time_base
    for at in range(max(index.search_timestamp(int(start_s / stream.time_base)), 0), len(index)):
        entry = index[at]
        if entry.timestamp > last:
            break
        places[entry.timestamp] = entry.pos
    return places
