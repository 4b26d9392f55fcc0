"""The one order in which training sees its samples: a function of (row groups, seed, epoch) and of nothing else.

Row groups are permuted by (seed, epoch), then the rows inside windows of a few consecutive groups, so that a reader
streams whole row groups and the mixing is still wide. Epochs follow each other without a gap: sample position P lies in
epoch P // num_rows. Inside a global batch, position p goes to rank p mod world, so the batches are the same sets
for any number of workers, and a run resumes from its sample count alone.

Several datasets are mixed by weight: every block of sum(weights) positions holds dataset d exactly weights[d] times, in
an order drawn by (seed, block), and the k-th use of a dataset is position k of an order of its own, with its own epochs
and seed. So shares are exact, each dataset is read in sequence, and any position is found by itself.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from pipelines.errors import InputError

Finder = Callable[[np.ndarray], np.ndarray]
"""Sample positions int64 [n] -> their places int64 [n, 2], (row group, row inside it)."""
WINDOW = 4
"""Row groups whose rows are mixed with each other."""
_BLOCK, _DATASET = 0, 1
"""What a number is drawn for, in a seed of three words; an epoch's has two."""


class Order(Protocol):
    """An endless sequence of places."""

    def finder(self) -> Finder:
        """Return a function that looks positions up; it remembers what it drew last, since they come in sequence."""
        ...


@dataclass(frozen=True)
class GlobalOrder:
    """The endless sequence of (row group, row) of a dataset whose row groups have the given sizes."""

    group_sizes: tuple[int, ...]
    seed: int
    window: int = WINDOW

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"the shuffle window must be at least 1 row group, got {self.window}")
        if sum(self.group_sizes) == 0:
            raise InputError("there is no row to train on: the chosen split of the dataset is empty")

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return sum(self.group_sizes)

    def epoch(self, index: int) -> np.ndarray:
        """Return epoch `index` as int64 [num_rows, 2]: (row group, row inside it), each row exactly once."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, index))))
        groups = rng.permutation(len(self.group_sizes))
        windows = [
            rng.permutation(self._rows_of(groups[start : start + self.window]))
            for start in range(0, len(groups), self.window)
        ]
        return np.concatenate(windows)

    def finder(self) -> Finder:
        """See `Order`; one epoch is remembered."""
        known = -1, np.empty((0, 2), np.int64)

        def find(positions: np.ndarray) -> np.ndarray:
            nonlocal known
            places = np.empty((len(positions), 2), np.int64)
            epochs, rows = np.divmod(positions, self.num_rows)
            for epoch in np.unique(epochs):
                if known[0] != epoch:
                    known = int(epoch), self.epoch(int(epoch))
                chosen = epochs == epoch
                places[chosen] = known[1][rows[chosen]]
            return places

        return find

    def _rows_of(self, groups: np.ndarray) -> np.ndarray:
        sizes = np.array([self.group_sizes[group] for group in groups])
        rows = np.concatenate([np.arange(size) for size in sizes])
        return np.stack([np.repeat(groups, sizes), rows], axis=1)


@dataclass(frozen=True)
class MixedOrder:
    """The endless sequence of (row group, row) of several datasets, whose row groups are counted through."""

    group_sizes: tuple[tuple[int, ...], ...]
    """By dataset; none may be empty."""
    weights: tuple[int, ...]
    """Uses of each dataset in a block, each at least 1."""
    seed: int

    @property
    def block_length(self) -> int:
        """Positions of a block."""
        return sum(self.weights)

    @cached_property
    def orders(self) -> tuple[GlobalOrder, ...]:
        """The order of each dataset by itself, its row groups counted from 0."""
        seeds = (_word(self.seed, _DATASET, which) for which in range(len(self.group_sizes)))
        return tuple(GlobalOrder(sizes, seed) for sizes, seed in zip(self.group_sizes, seeds, strict=True))

    def block(self, index: int) -> np.ndarray:
        """Return block `index` as int64 [block_length, 2]: the dataset, and which use of it this is, from 0."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, _BLOCK, index))))
        datasets = rng.permutation(np.repeat(np.arange(len(self.weights)), self.weights))
        uses = np.empty(len(datasets), np.int64)
        for which, weight in enumerate(self.weights):
            uses[datasets == which] = np.arange(index * weight, (index + 1) * weight)
        return np.stack([datasets, uses], axis=1)

    def finder(self) -> Finder:
        """See `Order`; one block, and one epoch of each dataset, is remembered."""
        finders = [order.finder() for order in self.orders]
        firsts = [0, *itertools.accumulate(len(sizes) for sizes in self.group_sizes)]
        known = -1, np.empty((0, 2), np.int64)

        def find(positions: np.ndarray) -> np.ndarray:
            nonlocal known
            uses = np.empty((len(positions), 2), np.int64)
            blocks, inside = np.divmod(positions, self.block_length)
            for block in np.unique(blocks):
                if known[0] != block:
                    known = int(block), self.block(int(block))
                chosen = blocks == block
                uses[chosen] = known[1][inside[chosen]]
            places = np.empty((len(positions), 2), np.int64)
            for which, find_own in enumerate(finders):
                mine = uses[:, 0] == which
                own = find_own(uses[mine, 1])
                own[:, 0] += firsts[which]
                places[mine] = own
            return places

        return find


def _word(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is dealt out: to ranks by position, then into micro batches.

    Raises InputError where the batch does not divide.
    """

    batch_size: int
    """Samples of one optimizer step, over all ranks."""
    world_size: int
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.world_size * self.accumulation):
            raise InputError(
                f"--batch-size {self.batch_size} does not divide by {self.world_size} workers x "
                f"{self.accumulation} accumulation steps: choose a multiple of {self.world_size * self.accumulation}"
            )

    @property
    def micro_size(self) -> int:
        """Samples of one forward on one rank."""
        return self.batch_size // (self.world_size * self.accumulation)

    def positions(self, step: int, rank: int) -> np.ndarray:
        """Return the sample positions of one rank in one step: int64 [accumulation, micro_size]."""
        first = step * self.batch_size
        mine = np.arange(first + rank, first + self.batch_size, self.world_size)
        return mine.reshape(self.accumulation, self.micro_size)
