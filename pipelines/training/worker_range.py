"""How many workers a training may have: one number, or a range in which the cluster decides.

Under a range Ray Train takes as many as the cluster holds when it starts a group, goes on with fewer when a node is
lost, and starts the group again with more when there is room. The global batch stays, and so does the micro batch of a
worker as the whole group has it: fewer workers take more micro batches a step.
"""

import math
import re
from dataclasses import dataclass

from pipelines.errors import InputError

NumWorkers = int | str
"""As a command line says it: 4, or "2:8"."""


@dataclass(frozen=True)
class WorkerRange:
    """From `least` to `most` workers; equal where the number is fixed, both 0 where there are none."""

    least: int
    most: int

    @classmethod
    def of(cls, number: NumWorkers) -> "WorkerRange":
        """Read "N" or "MIN:MAX".

        Raises:
            InputError: it is neither, or no such range.
        """
        match = re.fullmatch(r"(\d+)(?::(\d+))?", str(number))
        if match is None:
            raise InputError(f"--num-workers {number}: give a number, or a range as 2:8")
        workers = cls(int(match[1]), int(match[2] or match[1]))
        if workers.is_elastic and not 1 <= workers.least < workers.most:
            raise InputError(f"--num-workers {number}: a range goes from at least 1 to a larger number")
        return workers

    @property
    def is_elastic(self) -> bool:
        """Whether the number may change."""
        return self.least != self.most

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.is_elastic else str(self.least)

    def check_batch(self, batch_size: int, accumulation: int) -> None:
        """Check that the global batch can be dealt out to every number of workers that may come.

        Raises:
            InputError: it cannot, with the numbers it does not divide by.
        """
        numbers = range(max(self.least, 1), max(self.most, 1) + 1)
        wrong = [number for number in numbers if batch_size % (number * accumulation)]
        if wrong:
            whole = math.lcm(*numbers) * accumulation
            raise InputError(
                f"--batch-size {batch_size} does not divide by {', '.join(map(str, wrong))} workers x {accumulation} "
                f"accumulation steps: with --num-workers {self} choose a multiple of {whole}, or another --num-workers"
            )
