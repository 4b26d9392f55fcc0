"""Units on Ray Data: a pool of actors, each of which processes and commits unit after unit.

What dies is replaced by Ray and its unit is done again; what hangs is killed first (`stall_watch.py`); what kills every
worker is given up after some attempts (`attempts.py`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.cluster import cluster_cpus
from pipelines.data import attempts
from pipelines.data.stall_watch import StallWatch
from pipelines.data.storage import open_folder
from pipelines.data.units import Pool, UnitOrder
from pipelines.devices import cpu_device, own_device
from pipelines.errors import ContractError, EnvironmentFailed, InputError, PipelineError, Refused, StageConflict
from pipelines.progress import Progress

_ERRORS = {e.__name__: e for e in (ContractError, EnvironmentFailed, InputError, Refused, StageConflict)}


class _CommittingActor:
    """One actor of the pool: makes its worker once."""

    def __init__(self, order: UnitOrder, on_gpu: bool, stall_s: float) -> None:
        # What Ray assigned and not what the machine has: an actor without a GPU may still see those of others.
        self._worker = order.factory(own_device() if on_gpu else cpu_device())
        self._order = order
        self._watch = StallWatch(stall_s)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        receipts = [self._commit(int(index)) for index in batch["unit"]]
        return {name: [receipt[name] for receipt in receipts] for name in receipts[0]}

    def _commit(self, index: int) -> dict[str, Any]:
        self._watch.beat()
        try:
            unit = self._order.units.unit(index)
            attempts.begin(open_folder(self._order.out), unit.unit_id, self._order.run_id)
            return {"rows": self._order.commit(self._worker, unit, self._watch.beat), "error": "", "what": ""}
        except PipelineError as error:
            # Travels as data: Ray's wrapping of exceptions would lose the type, and with it the exit code.
            return {"rows": 0, "error": type(error).__name__, "what": str(error)}
        finally:
            self._watch.rest()


def run_on_ray_data(order: UnitOrder, pool: Pool, progress: Progress) -> None:
    """Do all units of an order; connected to Ray.

    Raises:
        PipelineError: what a worker raised.
    """
    import ray
    from ray import exceptions
    from ray.data import ActorPoolStrategy

    from pipelines.data.ray_data import quiet_ray_data

    lost = (
        exceptions.RaySystemError,
        exceptions.RayActorError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
        exceptions.LocalRayletDiedError,
    )
    num_workers = min(pool.num_workers, len(order.todo))
    quiet_ray_data()
    # One block a unit: a unit is the grain of scheduling, retry and commit. Its rows are read by who does it.
    items = [{"unit": index} for index in order.todo]
    receipts = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _CommittingActor,
        fn_constructor_args=(order.for_workers(), pool.num_gpus > 0, pool.stall_s),
        batch_size=1,
        compute=ActorPoolStrategy(size=num_workers),
        num_cpus=actor_cpus(cluster_cpus(), num_workers),
        num_gpus=pool.num_gpus or None,
    )
    try:
        for receipt in receipts.iter_rows():
            if receipt["error"]:
                raise _ERRORS[receipt["error"]](receipt["what"])
            progress.advance(int(receipt["rows"]))
    except lost as error:
        raise EnvironmentFailed(
            f"the Ray cluster failed ({type(error).__name__}: {error}); look at `ray status`, then run the same "
            "command again"
        ) from error


def actor_cpus(total_cpus: float, num_workers: int) -> float:
    """CPU share of one actor, such that the pool never takes all of the cluster.

    A pool that holds every CPU leaves none for the rest of the plan and hangs without a word. A cluster that has no
    CPU yet grows by what is asked for.
    """
    if total_cpus < 1:
        return 1.0
    share = 0.7 * total_cpus / num_workers
    return float(math.floor(share)) if share >= 2 else 1.0 if share >= 1 else max(math.floor(share * 100) / 100, 0.01)
