"""One training as a few attempts: built again in this process when it rolled back, or when memory ran out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipelines.data.storage import Location
from pipelines.errors import EnvironmentFailed, first_line
from pipelines.training.adjustments import MemoryRanOut, RollBack, StartAgain
from pipelines.training.out_of_memory import halve_micro_batch, is_out_of_memory, release_memory
from pipelines.training.world import World

Result = TypeVar("Result")


@dataclass
class Attempt:
    """What an attempt is told, and what it tells."""

    cause: RollBack | None
    """Why the one before it went back to its checkpoint, if that is why there is another."""
    micro_size: int | None = None
    """Samples of one forward on this rank while it takes steps; None before and after."""


def repeat(
    body: Callable[[Attempt], Result], *, out: str, checkpoints: Location, loss_is_mean: bool, world: World
) -> Result:
    """Call `body` until it returns; it goes on from the newest of the `checkpoints` of `out`, and frees what it took.

    Raises:
        EnvironmentFailed: memory ran out and a smaller micro batch does not help.
        MemoryRanOut: the same, it does, and there are other ranks, which only a new group can tell of it.
    """
    cause: RollBack | None = None
    while True:
        try:
            return _once(body, cause, out, checkpoints, loss_is_mean)
        except RollBack as back:
            cause = RollBack(back.at_step, back.reason)
        except MemoryRanOut:
            if world.size > 1:
                raise
            cause = None
        except StartAgain:
            cause = None
        # Out here nothing refers to what the attempt held.
        release_memory(world.device)


def _once(
    body: Callable[[Attempt], Result], cause: RollBack | None, out: str, checkpoints: Location, loss_is_mean: bool
) -> Result:
    attempt = Attempt(cause)
    try:
        return body(attempt)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told = first_line(error)
    if attempt.micro_size is None:
        raise EnvironmentFailed(f"{out}: out of memory outside the steps, where no smaller batch helps: {told}")
    raise halve_micro_batch(out, checkpoints, attempt.micro_size, loss_is_mean=loss_is_mean)
