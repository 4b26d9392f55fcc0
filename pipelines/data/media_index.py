"""Whether a frame of a container without time stamps (avi) is where the index says that frame lies.

The demuxer counts chunks as it meets them, so a chunk lost to damage makes every later frame early. The index was
written when the file was whole: it knows the number of the frame at every place.
"""

from av.packet import Packet

CHUNK_HEADER_BYTES = 8


def off_its_index(packet: Packet) -> bool:
    """Whether the index of the packet's stream puts its time stamp at another place of the file; False if unknown."""
    if packet.dts is None or packet.pos is None or packet.size == 0:
        return False
    entries = packet.stream.index_entries
    at = entries.search_timestamp(packet.dts, any_frame=True)
    if at < 0 or entries[at].timestamp != packet.dts:
        return False
    return entries[at].pos not in (packet.pos, packet.pos - CHUNK_HEADER_BYTES)
