"""The one order in which training sees its samples: a function of (row groups, seed, epoch) and of nothing else.

Row groups are permuted by (seed, epoch), then the rows inside windows of a few consecutive groups, so that a reader
streams whole row groups and the mixing is still wide. Epochs follow each other without a gap: sample position P lies in
epoch P // num_rows. Inside a global batch, position p goes to rank p mod world, so the batches are the same sets
for any number of workers, and a run resumes from its sample count alone.
"""

from dataclasses import dataclass

import numpy as np

from pipelines.errors import InputError


@dataclass(frozen=True)
class GlobalOrder:
    """The endless sequence of (row group, row) of a dataset whose row groups have the given sizes."""

    group_sizes: tuple[int, ...]
    seed: int
    window: int = 4
    """Row groups whose rows are mixed with each other."""

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

    def _rows_of(self, groups: np.ndarray) -> np.ndarray:
        sizes = np.array([self.group_sizes[group] for group in groups])
        rows = np.concatenate([np.arange(size) for size in sizes])
        return np.stack([np.repeat(groups, sizes), rows], axis=1)


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
