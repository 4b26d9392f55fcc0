"""The body of test_elastic; see `tests.own_process`."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STEPS, BATCH = 18, 12
LOSE_AT, HOLD_AT = 5, 11
LIMIT_S = 300.0


def main(folder: Path) -> dict[str, Any]:
    """Train on two nodes, lose one in the middle, give another one back; and the same undisturbed in this process."""
    from pipelines.training.launch import fit
    from pipelines.training.loop import TrainingOrder
    from pipelines.training.options import TrainingOptions
    from tests.feature_factory import write_features
    from tests.toy_objective import ToyObjective

    features = str(write_features(folder / "features", {"train": 40, "val": 30}))
    options = TrainingOptions(steps=STEPS, batch_size=BATCH, lr=3e-2, clip=0.05, weight_decay=0.1, checkpoint_every=3)
    orders = {}
    for name in ("elastic", "quiet"):
        (folder / name / "keys").mkdir(parents=True)
        toy = ToyObjective(
            features=features, batch_size=BATCH, loss_is_mean=True, keys_folder=str(folder / name / "keys")
        )
        if name == "elastic":
            # Until one worker alone has begun, and until there are two again.
            holds = ((LOSE_AT, str(folder / "shrunk")), (HOLD_AT, str(folder / "grown")))
            toy = dataclasses.replace(toy, holds=holds)
        orders[name] = TrainingOrder(toy, options, str(folder / name))
    seconds = _train_on_changing_nodes(orders["elastic"], folder)
    fit(orders["quiet"], num_workers=0, report=lambda step, metrics: None)
    return seconds


def _train_on_changing_nodes(order: Any, folder: Path) -> dict[str, Any]:
    """Carry out the order; returns the seconds from a lost node to the next step, and from a new one to its rank."""
    import ray

    from pipelines.training.launch import fit
    from pipelines.training.workers import warm_workers
    from tests.pipelines.two_nodes_run import start_cluster

    cluster, second = start_cluster(2)
    ray.init(address=cluster.address, log_to_driver=False)
    seen: list[tuple[int, float]] = []
    seconds: dict[str, float] = {}
    # One death of the workers is allowed: the lost node. Growing must not count.
    warm = warm_workers("1:2", cpus_per_worker=0.7, max_failures=1, resize_check_s=5)
    with warm as group, ThreadPoolExecutor(1) as own:

        def report(step: int, metrics: dict[str, float]) -> None:
            seen.append((step, metrics["workers"]))

        training = own.submit(fit, order, num_workers="1:2", report=report, group=group)

        def wait_for(happened: Callable[[], bool]) -> float:
            began = time.monotonic()
            while not happened():
                if training.done() or time.monotonic() > began + LIMIT_S:
                    raise RuntimeError(f"did not come: {seen}, {training.result(timeout=0)}")
                time.sleep(0.1)
            return time.monotonic() - began

        wait_for(lambda: bool(seen) and seen[-1] == (LOSE_AT, 2))
        cluster.remove_node(second, allow_graceful=False)
        seconds["to shrink"] = wait_for(lambda: len(group.nodes()) == 1)
        (folder / "shrunk").touch()
        wait_for(lambda: seen[-1] == (HOLD_AT, 1))
        # Not in a thread: Ray sets signal handlers for a node.
        cluster.add_node(num_cpus=1, object_store_memory=200_000_000)
        seconds["to grow"] = wait_for(lambda: len(group.nodes()) == 2)
        (folder / "grown").touch()
        training.result(timeout=LIMIT_S)
    return seconds


if __name__ == "__main__":
    found = main(Path(sys.argv[1]))
    Path(sys.argv[1], "found.json").write_text(json.dumps(found))
