"""The body of test_two_nodes; see `tests.own_process`."""

import json
import sys
from pathlib import Path
from typing import Any

START_ATTEMPTS = 4


def main(folder: Path) -> dict[str, Any]:
    """Start two nodes of one CPU each, preprocess and train across them, and tell which node did what."""
    import ray

    cluster, _ = start_cluster(2)
    ray.init(address=cluster.address, log_to_driver=False)
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    preprocessed = _preprocess(folder)
    return {"nodes": nodes, "preprocess": preprocessed, **_train(folder)}


def start_cluster(nodes: int) -> tuple[Any, Any]:
    """Raylets of one CPU each, and the last of them; tried again where a busy machine does not start Ray's agent in the
    seconds that Ray allows it."""
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 200_000_000}
    for attempts_left in reversed(range(START_ATTEMPTS)):
        cluster = Cluster()
        try:
            last = [cluster.add_node(**size, **({} if i else {"include_dashboard": False})) for i in range(nodes)][-1]
            cluster.wait_for_nodes()
        except Exception:
            cluster.shutdown()
            if not attempts_left:
                raise
            continue
        return cluster, last
    raise RuntimeError("no attempt was made")


def _preprocess(folder: Path) -> list[str]:
    from ray._private.state import actors

    from jobs import cli, make_demo_world, preprocess

    counts = ["--num-train=140", "--num-rpo=0", "--num-val=8", "--num-test=0", "--num-workers=0"]
    flags = ["tiny", *counts, "--out", str(folder / "world")]
    make_demo_world.main(cli.parse("make_demo_world", make_demo_world.Options, flags))
    # Two actors of 0.7 CPU: no node can hold both.
    manifest, out = str(folder / "world" / "clips.csv"), str(folder / "features")
    flags = ["tiny", "--manifest", manifest, "--out", out, "--num-workers=2"]
    preprocess.main(cli.parse("preprocess", preprocess.Options, flags))
    workers = [entry for entry in actors().values() if "_CommittingActor" in entry["ActorClassName"]]
    return sorted({entry["Address"]["NodeID"] for entry in workers})


def _train(folder: Path) -> dict[str, Any]:
    from pipelines.training.flow_matching_objective import FlowMatchingObjective, fit_starting_policy
    from pipelines.training.launch import fit
    from pipelines.training.loop import TrainingOrder
    from pipelines.training.options import TrainingOptions
    from pipelines.training.workers import warm_workers

    features = str(folder / "features")
    fit_starting_policy("tiny", 0, features, "train", folder / "start")
    objective = FlowMatchingObjective(start=str(folder / "start"), features=features, size="tiny")
    options = TrainingOptions(steps=4, batch_size=8, lr=1e-3, zero_stage=2, checkpoint_every=2)
    (folder / "out").mkdir()
    with warm_workers(2, cpus_per_worker=0.7) as group:
        order = TrainingOrder(objective, options, str(folder / "out"))
        result = fit(order, num_workers=2, report=lambda step, metrics: None, group=group)
        return {"training": sorted(set(group.nodes().values())), "steps": result.steps}


if __name__ == "__main__":
    found = main(Path(sys.argv[1]))
    Path(sys.argv[1], "found.json").write_text(json.dumps(found))
