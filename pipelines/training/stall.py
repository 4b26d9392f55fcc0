"""Finds the rank of a training that hangs, says which one and where, and ends it, so that its group starts again.

When one rank stops, all others stop too: they wait for it inside a collective. So every rank marks its place as it
goes through the same code (`Pulse`), a thread of each tells places to the order book (`Heart`), and the book compares
(`StallBoard`). The one to name is the one nobody hears of any more, or the one that is furthest behind. A rank whose
thread still runs ends itself when it is told so; one that is stopped or holds the interpreter is ended by the small
process beside it (`pipelines.data.stall_watch`), which waits for the thread's signs.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.data.stall_watch import StallWatch

BEATS_PER_LIMIT, LONGEST_BEAT_S = 6, 10.0
SILENT_BEATS = 3
"""Beats that may be missing before a rank counts as silent."""


@dataclass(frozen=True)
class Place:
    """How far a rank is."""

    marks: int
    """Marks it has passed; every rank passes the same ones."""
    step: int
    phase: str


class Pulse:
    """This rank's place, marked by the loop and read by another thread."""

    def __init__(self) -> None:
        self._place: Place | None = None
        self._marks = 0

    @property
    def place(self) -> Place | None:
        """The last mark; None while nothing is waited for."""
        return self._place

    def at(self, step: int, phase: str) -> None:
        """Pass a mark: step counted from 0, and what begins. Only where every rank passes it."""
        self._marks += 1
        self._place = Place(self._marks, step, phase)

    def rest(self) -> None:
        """Nobody waits for this rank from here on."""
        self._place = None


@dataclass(frozen=True)
class Stall:
    """Ranks that hang, with the places they were last heard from, and where the others wait for them."""

    hanging: dict[int, Place]
    waiting: Place | None
    """The furthest place of any other rank; None where there is none."""

    def line(self, limit_s: float) -> str:
        """One line for people. Ranks pass every step together, so the step is the one in which the others wait."""
        last = {rank: f"step {place.step + 1}, {place.phase}" for rank, place in self.hanging.items()}
        ranks = ", ".join(f"rank {rank} (last heard from in {where})" for rank, where in last.items())
        where = (
            f" in step {self.waiting.step + 1}, where the others wait ({self.waiting.phase})" if self.waiting else ""
        )
        return f"{ranks} made no progress for {limit_s:g} s{where}: it is ended, and the group starts again"


@dataclass
class _Sign:
    place: Place
    heard_s: float
    moved_s: float


class StallBoard:
    """The places of all ranks as the order book hears of them, on the book's own clock (seconds, monotonic)."""

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: longest time at one place."""
        self.limit_s = limit_s
        self._silent_s = SILENT_BEATS * beat_s(limit_s)
        self._signs: dict[int, _Sign] = {}
        self._stall: Stall | None = None

    def hear(self, rank: int, place: Place | None, now_s: float) -> bool:
        """Take a beat; True tells the rank that it is the one that hangs. None: nobody waits for it any more."""
        if place is None:
            self._signs.pop(rank, None)
            return False
        known = self._signs.get(rank)
        moved_s = known.moved_s if known is not None and known.place == place else now_s
        self._signs[rank] = _Sign(place, now_s, moved_s)
        stall = self.stall(now_s)
        return stall is not None and rank in stall.hanging

    def stall(self, now_s: float) -> Stall | None:
        """Return which ranks hang, None if none does; once some do, always the same."""
        if self._stall is None and self._signs:
            silent = [rank for rank, sign in self._signs.items() if now_s - sign.heard_s > self._silent_s]
            least = min(sign.place.marks for sign in self._signs.values())
            behind = [rank for rank, sign in self._signs.items() if sign.place.marks == least]
            suspects = sorted(silent or behind)
            if all(now_s - self._signs[rank].moved_s > self.limit_s for rank in suspects):
                others = [sign.place for rank, sign in self._signs.items() if rank not in suspects]
                waiting = max(others, key=lambda place: place.marks, default=None)
                self._stall = Stall({rank: self._signs[rank].place for rank in suspects}, waiting)
        return self._stall


def beat_s(limit_s: float) -> float:
    """Seconds between two beats of a heart."""
    return min(limit_s / BEATS_PER_LIMIT, LONGEST_BEAT_S)


class Heart:
    """A thread beside the loop of one rank that tells its place; and a process beside both for when it cannot."""

    def __init__(self, rank: int, pulse: Pulse, limit_s: float, tell: Callable[[Place | None], bool]) -> None:
        """`tell` brings a place to the board and returns its answer; what it raises is passed over."""
        self._rank, self._pulse, self._limit_s, self._tell = rank, pulse, limit_s, tell
        # Later than the board's verdict, so that the rank is named before it is gone.
        self._watch = StallWatch(limit_s + 2 * beat_s(limit_s))
        self._watch.beat()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heart")
        self._thread.start()

    def close(self) -> None:
        """Stop; nobody waits for this rank any more."""
        self._over.set()
        self._thread.join()
        self._pulse.rest()
        self._tell_quietly()
        self._watch.close()

    def _beat(self) -> None:
        while not self._over.wait(beat_s(self._limit_s)):
            self._watch.beat()
            if self._tell_quietly():
                logging.getLogger(__name__).error("rank %d hangs at %s: ended", self._rank, self._pulse.place)
                time.sleep(beat_s(self._limit_s))  # The launcher asks the board too, and is to hear it first.
                os.kill(os.getpid(), signal.SIGKILL)

    def _tell_quietly(self) -> bool:
        try:
            return self._tell(self._pulse.place)
        except Exception:
            # A book that cannot be reached is the launcher's trouble, not this rank's.
            return False
