"""Preprocess and a training with two workers across two raylets, each step shown to have run on both nodes."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster import LOOPBACK_VARIABLES
from pipelines.training.journal import read_journal
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder
from pipelines.training.options import TrainingOptions

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A cluster of two nodes of one CPU each; a pool of two actors cannot fit on either. Yields the node ids."""
    for name, value in LOOPBACK_VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 200_000_000, "include_dashboard": False},
    )
    cluster.add_node(num_cpus=1, object_store_memory=200_000_000)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    finally:
        ray.shutdown()
        cluster.shutdown()


def _nodes_of_actors(name: str) -> set[str]:
    """Node ids of every actor, alive or gone, whose class name contains `name`."""
    from ray._private.state import actors

    found = actors()
    return {entry["Address"]["NodeID"] for entry in found.values() if name in entry["ActorClassName"]}


def test_preprocess_and_training_run_on_both_nodes(two_nodes: list[str], tmp_path: Path) -> None:
    from jobs import cli, make_demo_world, preprocess
    from pipelines.data.contracts import FEATURES
    from pipelines.data.store import Dataset
    from pipelines.training.flow_matching_objective import FlowMatchingObjective, fit_starting_policy
    from pipelines.training.workers import warm_workers

    assert len(two_nodes) == 2
    world, features = tmp_path / "world", tmp_path / "features"
    counts = ["--num-train=140", "--num-rpo=0", "--num-val=8", "--num-test=0", "--num-workers=0"]
    make_demo_world.main(cli.parse("make_demo_world", make_demo_world.Options, ["tiny", *counts, "--out", str(world)]))
    flags = ["tiny", "--manifest", str(world / "clips.csv"), "--out", str(features), "--num-workers=2"]
    preprocess.main(cli.parse("preprocess", preprocess.Options, flags))
    assert Dataset.open(str(features), FEATURES).splits == {"train": 140, "val": 8}
    assert _nodes_of_actors("_CommittingActor") == set(two_nodes)

    fit_starting_policy("tiny", 0, str(features), "train", tmp_path / "start")
    objective = FlowMatchingObjective(start=str(tmp_path / "start"), features=str(features), size="tiny")
    options = TrainingOptions(steps=4, batch_size=8, lr=1e-3, zero_stage=2, checkpoint_every=2)
    (tmp_path / "out").mkdir()
    with warm_workers(2, cpus_per_worker=0.7) as group:
        order = TrainingOrder(objective, options, str(tmp_path / "out"))
        result = fit(order, num_workers=2, report=lambda step, metrics: None, group=group)
        nodes = group.nodes()
    assert result.steps == 4
    assert set(nodes.values()) == set(two_nodes)
    assert [record["step"] for record in read_journal(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4]
