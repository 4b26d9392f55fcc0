"""Which packets of a picture need not be decoded: nothing is built on their frame, and no grid shows it.

Part of the reader (`media.py`); plain numbers only. The presentation times of the packets ahead say until when a frame
is shown. Looking ahead too little, or packets that come later than they should, can only make a frame look longer
shown than it is, so that too much is decoded and never too little.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipelines.data.window import FrameGrid

LOOKAHEAD = 17
"""Packets: one more than H.264 and H.265 let a frame be held back."""
REMEMBERED = 2 * LOOKAHEAD

Packet = TypeVar("Packet")


@dataclass(frozen=True)
class Planned(Generic[Packet]):
    """A packet with what is known about its frame."""

    packet: Packet
    time_s: float | None
    """When its frame is shown, seconds of the window; None where that is not known or no frame comes of it."""
    shown: bool
    """Whether some grid may show its frame."""


class FramePlan(Generic[Packet]):
    """Packets in decoding order -> the same packets, a little later, with whether their frames are shown."""

    def __init__(self, grids: Sequence[FrameGrid], tolerance_s: float) -> None:
        """`tolerance_s` is the `FrameSampler`'s."""
        self._grids = grids
        self._tolerance_s = tolerance_s
        self._ahead: deque[tuple[Packet, float | None]] = deque()
        self._passed: deque[float] = deque(maxlen=REMEMBERED)
        self._earliest_s = math.inf
        self.last_s = max((grid.num_frames - 1) / grid.rate_hz for grid in grids)
        """The last time that any grid shows, seconds of the window."""

    def push(self, packet: Packet, time_s: float | None) -> Iterator[Planned[Packet]]:
        """Take the next packet; gives those that enough is known about."""
        self._ahead.append((packet, time_s))
        if time_s is not None:
            self._earliest_s = min(self._earliest_s, time_s)
        while len(self._ahead) > LOOKAHEAD:
            yield self._pop()

    def rest(self) -> Iterator[Planned[Packet]]:
        """What is left when no more packets come."""
        while self._ahead:
            yield self._pop()

    def _pop(self) -> Planned[Packet]:
        packet, time_s = self._ahead.popleft()
        if time_s is None:
            return Planned(packet, None, shown=False)
        later = [t for _, t in self._ahead if t is not None and t > time_s]
        later += [t for t in self._passed if t > time_s]
        self._passed.append(time_s)
        return Planned(packet, time_s, self._is_shown(time_s, min(later, default=math.inf)))

    def _is_shown(self, time_s: float, next_s: float) -> bool:
        """Whether a grid has a time at which the frame of `time_s` is the latest one."""
        # Before the first frame the first is shown.
        since_s = -math.inf if time_s <= self._earliest_s else time_s - self._tolerance_s
        until_s = next_s - self._tolerance_s
        for grid in self._grids:
            index = max(math.floor(since_s * grid.rate_hz), 0) if math.isfinite(since_s) else 0
            while index < grid.num_frames and index / grid.rate_hz < since_s:
                index += 1
            if index < grid.num_frames and index / grid.rate_hz < until_s:
                return True
        return False
