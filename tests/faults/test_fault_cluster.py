"""A node is lost in the middle of preprocess, then the whole head; the result is that of an undisturbed run."""

import json
from pathlib import Path

import pytest

from tests.own_process import run_with_own_ray


@pytest.mark.slow
@pytest.mark.ray
def test_fault_22_24_a_lost_node_costs_nothing_and_a_restarted_head_continues(tmp_path: Path) -> None:
    # How long a driver looks for a head that is gone.
    patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
    run_with_own_ray(Path(__file__).with_name("cluster_loss_run.py"), tmp_path, **patience)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["parts_at_node_loss"] < found["parts_at_head_loss"] < found["parts"]
    assert found["first_exit"] != 0
    assert found["second_exit"] == 0
    assert found["digest"] == found["quiet_digest"]
    assert found["counts"] == found["quiet_counts"]
