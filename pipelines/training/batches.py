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
from pipelines.training.objective import Batch, Data, DataRef, Draws
from pipelines.training.order import WINDOW, BatchPlan, GlobalOrder, MixedOrder, Order

CACHE_BYTES = 2**30
"""Row groups that are kept; of several datasets at least what the windows of all hold, or each would be read again and
again."""
PREFETCHED_BATCHES = 4
SAMPLE_ROWS = 2
"""Of a batch that is made for its shapes alone: losses over a batch need more than one row."""


@dataclass(frozen=True)
class _Group:
    """A row group of one of the datasets."""

    dataset: Dataset
    part: Part
    index: int
    kept: np.ndarray | None
    """The rows that are used, int64; None: all."""

    @property
    def size(self) -> int:
        return self.part.row_groups[self.index] if self.kept is None else len(self.kept)

    def read(self, columns: tuple[str, ...]) -> pa.Table:
        known = {column.name for column in self.dataset.contract.columns}
        table = self.dataset.read_row_group(self.part, self.index, [name for name in columns if name in known])
        return table if self.kept is None else table.take(pa.array(self.kept))


class RowGroups:
    """Random access to the row groups of one split of one or several datasets, projected to a few columns.

    A column that a dataset's contract does not have is null in its rows where they are taken together with rows that
    have it, and absent where none of them has. InputError for a column that is in no contract at all.
    """

    def __init__(self, data: Data, columns: tuple[str, ...]) -> None:
        self._columns = columns
        members, self._weights = ((data,), (1,)) if isinstance(data, DataRef) else (data.members, data.weights)
        self._by_dataset = [_groups_of(member) for member in members]
        _check_columns(columns)
        self._groups = [group for groups in self._by_dataset for group in groups]
        self._largest_bytes = 0
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_bytes = 0
        self._read_bytes, self._read_rows = 0, 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each group that are used, in the manifest's order, one dataset after the other."""
        return tuple(group.size for group in self._groups)

    def order(self, seed: int) -> GlobalOrder | MixedOrder:
        """Return the order in which a training with `seed` sees the rows."""
        if len(self._by_dataset) == 1:
            return GlobalOrder(self.sizes, seed)
        sizes = tuple(tuple(group.size for group in groups) for groups in self._by_dataset)
        return MixedOrder(sizes, self._weights, seed)

    @property
    def row_bytes(self) -> float:
        """Mean bytes of a row's columns as they lie in memory, over the row groups read so far; NaN before any."""
        return self._read_bytes / self._read_rows if self._read_rows else math.nan

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
        return pa.concat_tables(pieces, promote_options="default").take(pa.array(where))

    def _read(self, group: int) -> pa.Table:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        table = self._groups[group].read(self._columns)
        self._largest_bytes = max(self._largest_bytes, table.nbytes)
        self._read_bytes += table.nbytes
        self._read_rows += table.num_rows
        self._cache[group] = table
        self._cached_bytes += table.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return table

    @property
    def _cache_bytes(self) -> int:
        num_datasets = len(self._by_dataset)
        if num_datasets == 1:
            return CACHE_BYTES
        return max(CACHE_BYTES, num_datasets * (WINDOW + 1) * self._largest_bytes)


def _check_columns(columns: tuple[str, ...]) -> None:
    """Raise InputError for a column that no contract has: one of another dataset's is null, a misspelt one is wrong."""
    unknown = set(columns) - {column.name for contract in CONTRACTS.values() for column in contract.columns}
    if unknown:
        raise InputError(f"no column {', '.join(sorted(unknown))} in any contract")


def _groups_of(data: DataRef) -> list[_Group]:
    """The row groups of one dataset's split.

    Raises:
        InputError: no row of it is to be used.
    """
    dataset = Dataset.open(data.location, CONTRACTS[data.contract])
    groups = []
    for part in dataset.parts:
        if data.split in (None, part.split):
            for index in range(len(part.row_groups)):
                kept = None
                if data.keep_column is not None:
                    flags = dataset.read_row_group(part, index, [data.keep_column])[data.keep_column]
                    kept = np.flatnonzero(flags.to_numpy())
                groups.append(_Group(dataset, part, index, kept))
    if sum(group.size for group in groups) == 0:
        raise InputError(
            f"{data.location} has no row to use (split {data.split}, {data.keep_column or 'all rows'}); "
            f"it has {dataset.splits}"
        )
    return groups


Collate = Callable[[pa.Table, Draws], Batch]


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Everything that fixes the batches of one rank."""

    groups: RowGroups
    order: Order
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
        find = self.order.finder()
        for step in range(first_step, last_step):
            for positions in self.plan.positions(step, self.rank):
                draws = Draws(self.seed, "training", tuple(int(position) for position in positions))
                yield self.collate(self.groups.take(find(positions)), draws)


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
