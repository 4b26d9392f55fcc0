"""AVI has no time stamps: FFmpeg counts chunks, and behind a damaged one the count is wrong. The index knows better.

Part of the reader (`media.py`). Damage to the index itself shows in its length.
"""

from collections.abc import Sequence
from fractions import Fraction

from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream

CHUNK_HEADER_BYTES = 8
MAX_LOST_S = 0.1
"""An index that ends earlier than this before the picture's length has holes, and every time behind a hole is wrong."""


class AviPlaces:
    """Where the chunks of a stretch of time lie by the file's own index."""

    def __init__(self, streams: Sequence[Stream], start_s: Fraction, end_s: Fraction) -> None:
        """Copied before anything is read: reading adds to FFmpeg's index what it wrongly counts."""
        self._places = {stream.index: _places(stream, start_s, end_s) for stream in streams}

    def is_displaced(self, packet: Packet) -> bool:
        """Whether the index has another place for the chunk of the packet's time; False where it has none."""
        place = self._places.get(packet.stream_index, {}).get(packet.dts)
        return place is not None and packet.pos is not None and place + CHUNK_HEADER_BYTES != packet.pos


def lost_s(stream: VideoStream) -> float:
    """Seconds that the index of a picture ends before the length in the header; 0 where there is none of either."""
    index = stream.index_entries
    if not len(index) or not stream.duration or stream.time_base is None:
        return 0.0
    end = (stream.start_time or 0) + stream.duration
    frame_s = 1 / stream.average_rate if stream.average_rate else 0
    return float((end - index[len(index) - 1].timestamp) * stream.time_base - frame_s)


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
