"""From row groups on disk to the batches of one rank, ahead of the loop in a thread.

A rank reads whole row groups, in the order of the global sequence, only the columns it needs; row groups that were read
lately stay in memory, so a dataset that fits is read once.
"""

import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipelines.data.contracts import CONTRACTS
from pipelines.data.store import Dataset, Part
from pipelines.errors import InputError
from pipelines.training.objective import Batch, DataRef, Draws
from pipelines.training.order import BatchPlan, GlobalOrder

CACHE_BYTES = 2**30
PREFETCHED_BATCHES = 4
SAMPLE_ROWS = 2
"""Of a batch that is made for its shapes alone: losses over a batch need more than one row."""


class RowGroups:
    """Random access to the row groups of one split, projected to a few columns."""

    def __init__(self, data: DataRef, columns: tuple[str, ...]) -> None:
        self._dataset = Dataset.open(data.location, CONTRACTS[data.contract])
        self._columns = columns
        self._groups: list[tuple[Part, int]] = [
            (part, index)
            for part in self._dataset.parts
            if data.split in (None, part.split)
            for index in range(len(part.row_groups))
        ]
        self._kept = self._rows_to_keep(data.keep_column)
        if sum(self.sizes) == 0:
            raise InputError(
                f"{data.location} has no row to use (split {data.split}, {data.keep_column or 'all rows'}); "
                f"it has {self._dataset.splits}"
            )
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_bytes = 0
        self._read_bytes, self._read_rows = 0, 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each group that are used, in the manifest's order."""
        if self._kept is not None:
            return tuple(len(rows) for rows in self._kept)
        return tuple(part.row_groups[index] for part, index in self._groups)

    @property
    def row_bytes(self) -> float:
        """Mean bytes of a row's columns as they lie in memory, over the row groups read so far; NaN before any."""
        return self._read_bytes / self._read_rows if self._read_rows else math.nan

    def _rows_to_keep(self, column: str | None) -> list[np.ndarray] | None:
        if column is None:
            return None
        tables = (self._dataset.read_row_group(part, index, [column]) for part, index in self._groups)
        return [np.flatnonzero(table[column].to_numpy()) for table in tables]

    def take(self, places: np.ndarray) -> pa.Table:
        """Return the rows at `places`, int64 [n, 2] of (group, row), in that order."""
        groups, inverse = np.unique(places[:, 0], return_inverse=True)
        pieces, where = [], np.empty(len(places), np.int64)
        start = 0
        for which, group in enumerate(groups):
            mine = np.flatnonzero(inverse == which)
            pieces.append(self._read(int(group)).take(pa.array(places[mine, 1])))
            where[mine] = np.arange(start, start + len(mine))
            start += len(mine)
        return pa.concat_tables(pieces).take(pa.array(where))

    def _read(self, group: int) -> pa.Table:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        part, index = self._groups[group]
        table = self._dataset.read_row_group(part, index, self._columns)
        if self._kept is not None:
            table = table.take(pa.array(self._kept[group]))
        self._read_bytes += table.nbytes
        self._read_rows += table.num_rows
        self._cache[group] = table
        self._cached_bytes += table.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return table


Collate = Callable[[pa.Table, Draws], Batch]


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Everything that fixes the batches of one rank."""

    groups: RowGroups
    order: GlobalOrder
    plan: BatchPlan
    rank: int
    seed: int
    collate: Collate

    def sample(self) -> Batch:
        """`SAMPLE_ROWS` times the first row: a batch for its shapes."""
        first = next(group for group, size in enumerate(self.groups.sizes) if size)
        places = np.full((SAMPLE_ROWS, 2), (first, 0), np.int64)
        return self.collate(self.groups.take(places), Draws(self.seed, "training", tuple(range(SAMPLE_ROWS))))

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the micro batches of steps [first_step, last_step), `accumulation` a step."""
        known = -1, np.empty((0, 2), np.int64)
        for step in range(first_step, last_step):
            for positions in self.plan.positions(step, self.rank):
                places = np.empty((len(positions), 2), np.int64)
                epochs, rows = np.divmod(positions, self.order.num_rows)
                for epoch in np.unique(epochs):
                    if known[0] != epoch:
                        known = int(epoch), self.order.epoch(int(epoch))
                    chosen = epochs == epoch
                    places[chosen] = known[1][rows[chosen]]
                draws = Draws(self.seed, "training", tuple(int(position) for position in positions))
                yield self.collate(self.groups.take(places), draws)


def validation_batches(
    groups: RowGroups, plan: BatchPlan, rank: int, seed: int, collate: Collate, *, whole: int
) -> Iterator[Batch]:
    """Yield this rank's micro batches of all rows in the manifest's order, always with the same draws.

    A global micro batch is `micro_size` x world rows, so that every rank takes part in every batch. The tail that does
    not fill `whole` rows, a global micro batch as asked for, is left out: the rows stay the same where the micro
    batches had to become smaller.
    """
    places = np.concatenate(
        [np.stack([np.full(size, group), np.arange(size)], axis=1) for group, size in enumerate(groups.sizes)]
    )
    width = plan.micro_size * plan.world_size
    for start in range(0, len(places) // whole * whole - width + 1, width):
        positions = np.arange(start + rank, start + width, plan.world_size)
        draws = Draws(seed, "validation", tuple(int(position) for position in positions))
        yield collate(groups.take(places[positions]), draws)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a rank's device; from pinned memory, so that the copy to a GPU waits for nothing."""
    if device.type == "cpu":
        return batch
    return {name: t.pin_memory().to(device, non_blocking=True) for name, t in batch.items()}


class Prefetched:
    """Runs an iterator of batches in a thread, a few ahead; its exceptions are raised where the batch is taken."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED_BATCHES)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(batches,), daemon=True, name="batches")
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stopped.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)

    def _fill(self, batches: Iterator[Batch]) -> None:
        try:
            for batch in batches:
                self._put(batch)
                if self._stopped.is_set():
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return
