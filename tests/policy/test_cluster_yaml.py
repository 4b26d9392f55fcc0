"""`cluster.yaml` is a cluster that Ray's own launcher accepts, with authentication on and nothing open."""

import copy
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def starts(cluster, which):
    return [command for command in cluster[which] if "ray start" in command]


def test_rays_own_schema_accepts_it(cluster):
    validate_config(prepare_config(copy.deepcopy(cluster)))


@pytest.mark.parametrize(
    "breakage", [{"max_worker": 3}, {"head_node_type": "nobody"}, {"idle_timeout_minutes": "soon"}]
)
def test_rays_own_schema_would_refuse_a_wrong_one(cluster, breakage):
    from jsonschema import ValidationError

    with pytest.raises((ValidationError, ValueError)):
        validate_config(prepare_config({**copy.deepcopy(cluster), **breakage}))


def test_it_has_a_head_cpu_workers_and_gpu_workers_that_come_and_go(cluster):
    types = cluster["available_node_types"]
    workers = {name: node for name, node in types.items() if name != cluster["head_node_type"]}
    assert types[cluster["head_node_type"]]["resources"]["CPU"] == 0
    assert any(node["resources"].get("GPU", 0) > 0 for node in workers.values())
    assert any(node["resources"].get("GPU", 0) == 0 for node in workers.values())
    assert all(node["min_workers"] < node["max_workers"] for node in workers.values())
    assert sum(node["max_workers"] for node in workers.values()) <= cluster["max_workers"]
    assert cluster["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("which", START_COMMANDS)
def test_every_node_starts_with_token_authentication(cluster, which):
    mounted = {path.replace("~", "$HOME", 1) for path in cluster["file_mounts"]}
    assert starts(cluster, which)
    for command in starts(cluster, which):
        assert "RAY_AUTH_MODE=token " in command
        token = command.split("RAY_AUTH_TOKEN_PATH=")[1].split()[0]
        assert token in mounted


def test_the_dashboard_and_its_jobs_api_listen_on_loopback(cluster):
    for command in starts(cluster, "head_start_ray_commands"):
        assert "--dashboard-host=127.0.0.1" in command
        assert "0.0.0.0" not in command


def test_nodes_install_from_the_lock(cluster):
    assert any("make -C ~/multisoundgen setup" in command for command in cluster["setup_commands"])
