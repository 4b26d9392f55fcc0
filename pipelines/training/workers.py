"""Ray Train worker groups that carry out one order after another. The only import of ray.train.

Ray is imported where it is used: `cluster.connect` has to set what Ray reads at its import.

Starting a group (controller, workers, torch, DeepSpeed) costs half a minute on two cores, so a launch of many stages
starts it once: one `TorchTrainer.fit` in a thread, whose loop takes orders from a small actor, the order book. An order
is a training, or units of clips to sample and measure: so the GPUs that a launch holds do all of its work. A worker
that dies takes its group with it; Ray Train starts the group again, the new workers ask the book for the first
unfinished order, and that one goes on from what it finds in its folder.
"""

import logging
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from pipelines.cluster import cluster_cpus, cluster_gpus
from pipelines.devices import cpu_device
from pipelines.errors import EnvironmentFailed, InputError, PipelineError, first_line
from pipelines.training.adjustments import MemoryRanOut
from pipelines.training.order_book import Order, OrderBook, Result_co
from pipelines.training.stall import Heart
from pipelines.training.worker_range import NumWorkers, WorkerRange
from pipelines.training.world import Report, World

DEFAULT_MAX_FAILURES = 3
IDLE_CPUS = 0.1
"""CPUs that each worker of a group reserves which shares its machines with other stages: while those run the group
is idle, so it must not keep their actors from starting."""
POLL_S = 0.2
START_WARNING_S = 120.0
FAREWELL_S, BROKEN_OFF_S = 60.0, 3.0
"""How long to wait for idle workers to leave, and for workers that an error left in the middle of a training."""
RESIZE_CHECK_S = 60.0
"""How often a group that may grow looks whether there is room for more workers: each growth costs a start."""
RETRIED = (RuntimeError, OSError)
"""What the death of a peer, a lost node or storage looks like from inside a worker; anything else is a defect."""


class WorkerGroup:
    """The driver's handle of a running group."""

    def __init__(self, book: Any, thread: threading.Thread, failure: list[BaseException], workers: WorkerRange) -> None:
        self._book, self._thread, self._failure = book, thread, failure
        self.workers = workers

    def nodes(self) -> dict[int, str]:
        """Return the Ray node id of every rank that has started."""
        import ray

        return ray.get(self._book.nodes.remote())

    def run(self, order: Order[Result_co], report: Report) -> Result_co:
        """Have one order carried out; `report` is told of its progress.

        Raises:
            PipelineError: what the work itself raised, with its exit code.
            EnvironmentFailed: the group cannot be kept alive.
        """
        from ray.exceptions import RayActorError

        try:
            return self._follow(order, report)
        except RayActorError as error:
            raise EnvironmentFailed(
                f"{order.out}: the actor that holds the workers together is gone ({first_line(error)}); "
                "run the same command again"
            ) from error

    def _follow(self, order: Order[Result_co], report: Report) -> Result_co:
        import ray

        number = ray.get(self._book.place.remote(order))
        placed = time.monotonic()
        warned = False
        while True:
            (result, error, exit_code, news), hanging = ray.get(
                [self._book.state.remote(number), self._book.stalled.remote(number)]
            )
            if hanging is not None:
                logging.getLogger(__name__).warning("%s: %s", order.out, hanging)
            for step, metrics in news:
                report(step, metrics)
            if error is not None:
                raise _rebuild(error, exit_code)
            if result is not None:
                return result
            if not self._thread.is_alive():
                reason = self._failure[0] if self._failure else "it returned early"
                raise EnvironmentFailed(f"{order.out}: the training workers are gone: {first_line(reason)}")
            if news:
                warned = True
            elif not warned and time.monotonic() - placed > START_WARNING_S:
                warned = True
                logging.getLogger(__name__).warning("still waiting for %s training workers", self.workers)
            time.sleep(POLL_S)


@contextmanager
def warm_workers(
    num_workers: NumWorkers,
    *,
    cpus_per_worker: float = 1,
    gpus_per_worker: int | None = None,
    max_failures: int = DEFAULT_MAX_FAILURES,
    resize_check_s: float = RESIZE_CHECK_S,
) -> Iterator[WorkerGroup]:
    """Keep a group of training workers inside the block; they start at once, in the background.

    Args:
        num_workers: processes, or a range of them; with GPUs packed on few nodes, otherwise spread over the nodes.
        cpus_per_worker: what each reserves; `IDLE_CPUS` for a group that lies idle while other stages run.
        gpus_per_worker: 0 or 1; None is 1 where the cluster has so many now. With 1 the group waits for a cluster that
            is still growing.
        max_failures: how often in a row one training may lose its workers without a step further.
        resize_check_s: how often a range looks whether there is room for more.

    Raises:
        InputError: the cluster can never hold the group.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    workers = WorkerRange.of(num_workers)
    gpu = cluster_gpus() >= workers.least if gpus_per_worker is None else gpus_per_worker > 0
    if gpus_per_worker != 1 and cluster_cpus() < workers.least * cpus_per_worker:
        raise InputError(
            f"--num-workers {workers}: the cluster has {cluster_cpus():g} CPUs and {cluster_gpus():g} GPUs; "
            "on one that grows when asked, give --gpus-per-worker 1"
        )
    scratch = tempfile.mkdtemp(prefix="workers-")
    # Beside the driver, as Ray's own controller: another node may be lost, and the training goes on without it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    book: Any = ray.remote(OrderBook).options(num_cpus=0, scheduling_strategy=here).remote(max_failures)
    config = {"book": book, "gpu": gpu, "most": workers.most if workers.is_elastic else None}
    trainer = _trainer(config, workers, cpus_per_worker, resize_check_s, scratch)
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="training-workers")
    thread.start()
    patience_s = BROKEN_OFF_S
    try:
        yield WorkerGroup(book, thread, failure, workers)
        patience_s = FAREWELL_S
    finally:
        with suppress(RayError):
            ray.get(book.close.remote())
            thread.join(timeout=patience_s)
        ray.kill(book)
        shutil.rmtree(scratch, ignore_errors=True)


def _trainer(
    config: dict[str, Any], workers: WorkerRange, cpus_per_worker: float, resize_check_s: float, scratch: str
) -> Any:
    """A `TorchTrainer` whose workers run `_work` with `config`, started again as often as it takes."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    gpu = config["gpu"]
    return TorchTrainer(
        _work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=(workers.least, workers.most) if workers.is_elastic else workers.most,
            elastic_resize_monitor_interval_s=resize_check_s,
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if gpu else {})},
            placement_strategy="PACK" if gpu else "SPREAD",
        ),
        run_config=RunConfig(
            name=f"workers-{uuid.uuid4().hex[:12]}",
            # Ray Train's own state only: checkpoints are ours and lie with the artifact.
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=-1),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """What every worker process runs: take orders until the book is closed."""
    import ray.train

    book = config["book"]
    context = ray.train.get_context()
    if config["gpu"]:
        from ray.train.torch import get_device

        device = get_device()
        assert isinstance(device, torch.device)
    else:
        device = cpu_device()
    world = World(context.get_world_rank(), context.get_world_size(), device, most=config["most"])
    ray.get(book.enrol.remote(world.rank, world.size, ray.get_runtime_context().get_node_id()))
    number = -1
    while True:
        what, found, order = ray.get(book.next.remote(number))
        if what == "stop":
            return
        if order is None:
            time.sleep(POLL_S)
            continue
        number = found
        _do(book, number, order, world)


def _do(book: Any, number: int, order: Order[Any], world: World) -> None:
    import ray

    may_start = world.share(ray.get(book.begin.remote(number, world.size)) if world.is_main else None)
    if not may_start:
        return
    try:
        with _watched(book, number, order.stall_timeout_s, world):
            result = order.run(world, lambda step, metrics: book.report.remote(number, step, metrics))
    except MemoryRanOut:
        ray.get(book.excuse.remote(number))
        raise
    except PipelineError as error:
        ray.get(book.fail.remote(number, str(error), error.exit_code))
        raise
    except Exception as error:
        if not isinstance(error, RETRIED):
            text = f"{order.out}: {type(error).__name__} in a worker: {first_line(error)}"
            ray.get(book.fail.remote(number, text, 1))
        raise
    if result is not None:
        ray.get(book.finish.remote(number, result))


@contextmanager
def _watched(book: Any, number: int, limit_s: float | None, world: World) -> Iterator[None]:
    """Inside, this rank's place is told to the book, and a rank that hangs is ended."""
    import ray

    if limit_s is None:
        yield
        return
    # Longer than the book ever takes; a beat that is lost to a busy machine is only a beat.
    patience_s = max(limit_s / 2, 1.0)
    heart = Heart(
        world.rank,
        world.pulse,
        limit_s,
        lambda place: ray.get(book.beat.remote(number, world.rank, place), timeout=patience_s),
    )
    try:
        yield
    except BaseException:
        # The ranks that die with this one say nothing more: they do not hang.
        book.leave.remote(number)
        raise
    finally:
        heart.close()


def _rebuild(message: str, exit_code: int) -> PipelineError:
    """Turn the error of a worker into the class with that exit code, since classes do not cross the book."""
    kinds: dict[int, Callable[[str], PipelineError]] = {
        kind.exit_code: kind for kind in (InputError, EnvironmentFailed)
    }
    return kinds.get(exit_code, PipelineError)(message)
