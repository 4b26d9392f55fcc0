"""A node is lost in the middle of preprocess, then the whole head; the result is that of an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 560.0


@pytest.mark.slow
@pytest.mark.ray
def test_fault_22_24_a_lost_node_costs_nothing_and_a_restarted_head_continues(tmp_path: Path) -> None:
    script = Path(__file__).with_name("cluster_loss_run.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["parts_at_node_loss"] < found["parts_at_head_loss"] < found["parts"]
    assert found["first_exit"] != 0
    assert found["second_exit"] == 0
    assert found["digest"] == found["quiet_digest"]
    assert found["counts"] == found["quiet_counts"]
