"""A real death in the middle of a map over units: SIGKILL the moment a number of units is committed."""

import multiprocessing
import os
import signal
from collections.abc import Callable

from pipelines.data import units


def dies_after(num_units: int, work: Callable[[], object]) -> None:
    """Do the work in a child that is killed the moment so many units are committed."""

    def doomed() -> None:
        commit, left = units.commit_unit, [num_units]

        def commit_and_die(*args: object) -> None:
            commit(*args)  # pyright: ignore[reportArgumentType]
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        units.commit_unit = commit_and_die
        work()

    child = multiprocessing.get_context("fork").Process(target=doomed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
