"""The order book: an actor that hands out orders to a worker group, takes their results, and counts what went wrong.

An order is work for a whole group. Workers ask for it, and whoever wants it done asks how far it is; nobody waits here.
"""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pipelines.errors import EnvironmentFailed
from pipelines.training.stall import Place, StallBoard
from pipelines.training.world import Report, World

Result_co = TypeVar("Result_co", covariant=True)


class Order(Protocol[Result_co]):
    """Work for a whole group, picklable; every rank runs it, and must pick up from what it finds in `out`."""

    @property
    def out(self) -> str:
        """Folder on storage that all workers see."""
        ...

    @property
    def stall_timeout_s(self) -> float | None:
        """Seconds without progress after which a rank is ended and the group started again; None: not watched."""
        ...

    def run(self, world: World, report: Report) -> Result_co | None:
        """Do this rank's share; the result on rank 0, once all ranks are through, and None on the others."""
        ...


@dataclass
class _Entry:
    order: Order[Any]
    attempts: int = 0
    world_size: int = 0
    """Of the last attempt."""
    board: StallBoard | None = None
    """Of the attempt that runs."""
    named: bool = False
    """Whether ranks that hang in this attempt were named."""
    excused: bool = False
    """Whether this attempt does not count."""
    result: Any = None
    error: str | None = None
    exit_code: int = 1
    progress: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    furthest: int = 0
    """Step that an attempt has reported."""

    @property
    def is_open(self) -> bool:
        return self.result is None and self.error is None


class OrderBook:
    """The actor that hands out orders and takes results; both sides poll it, so it never blocks."""

    def __init__(self, max_failures: int) -> None:
        self._entries: list[_Entry] = []
        self._max_failures = max_failures
        self._closed = False
        self._nodes: dict[int, str] = {}

    def place(self, order: Order[Any]) -> int:
        """Add an order; returns its number."""
        self._entries.append(_Entry(order))
        return len(self._entries) - 1

    def enrol(self, rank: int, world_size: int, node_id: str) -> None:
        """Note on which node a rank runs; ranks of a larger group before are gone."""
        self._nodes = {other: node for other, node in self._nodes.items() if other < world_size} | {rank: node_id}

    def nodes(self) -> dict[int, str]:
        """Return the node id of every rank that has enrolled."""
        return dict(self._nodes)

    def close(self) -> None:
        """Let the workers go home."""
        self._closed = True

    def next(self, after: int) -> tuple[str, int, Order[Any] | None]:
        """Return ("work", number, order) of the first open order above `after`, or "wait", or "stop"."""
        if self._closed:
            return "stop", -1, None
        for number in range(after + 1, len(self._entries)):
            if self._entries[number].is_open:
                return "work", number, self._entries[number].order
        return "wait", -1, None

    def begin(self, number: int, world_size: int = 1) -> bool:
        """Count an attempt; False, and the order fails, when there were too many.

        One that comes with more ranks than the last counts in its place: that was ended to make room for them.
        """
        entry = self._entries[number]
        has_grown = 0 < entry.world_size < world_size and not entry.excused
        entry.attempts += not has_grown
        entry.world_size = world_size
        if entry.attempts > self._max_failures + 1 and entry.is_open:
            entry.error = (
                f"{entry.order.out}: the workers died {self._max_failures + 1} times in a row without a step further; "
                "see their logs, then run the same command again"
            )
            entry.exit_code = EnvironmentFailed.exit_code
        limit_s = entry.order.stall_timeout_s
        entry.board = None if limit_s is None else StallBoard(limit_s)
        entry.named = entry.excused = False
        return entry.is_open

    def excuse(self, number: int) -> None:
        """Do not count the attempt that runs: it ends so that the next one can be another. Every rank may say so."""
        entry = self._entries[number]
        entry.attempts -= not entry.excused
        entry.excused = True

    def leave(self, number: int) -> None:
        """Watch nobody until the next attempt: this one is over, and its ranks go silent."""
        self._entries[number].board = None

    def beat(self, number: int, rank: int, place: Place | None) -> bool:
        """Take a sign of life; True tells the rank that the others wait for it and that it is to end itself."""
        board = self._entries[number].board
        return board is not None and board.hear(rank, place, time.monotonic())

    def stalled(self, number: int) -> str | None:
        """Say which ranks hang, once for every attempt."""
        entry = self._entries[number]
        if entry.board is None or entry.named:
            return None
        stall = entry.board.stall(time.monotonic())
        entry.named = stall is not None
        return None if stall is None else stall.line(entry.board.limit_s)

    def report(self, number: int, step: int, metrics: dict[str, float]) -> None:
        """Take progress from a rank. A step that no attempt had taken clears the account of deaths."""
        entry = self._entries[number]
        entry.progress.append((step, metrics))
        if step > entry.furthest:
            entry.furthest, entry.attempts = step, min(entry.attempts, 1)

    def finish(self, number: int, result: Any) -> None:
        """Take a result from rank 0."""
        self._entries[number].result = result

    def fail(self, number: int, error: str, exit_code: int) -> None:
        """Take an error that a further attempt would meet again."""
        entry = self._entries[number]
        if entry.is_open:
            entry.error, entry.exit_code = error, exit_code

    def state(self, number: int) -> tuple[Any, str | None, int, list[tuple[int, dict[str, float]]]]:
        """Return (result, error, exit code, progress reported since the last call)."""
        entry = self._entries[number]
        news, entry.progress = entry.progress, []
        return entry.result, entry.error, entry.exit_code, news
