"""A training is lost with the whole cluster that it was submitted to; the same command on another one continues it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.submitted_training_run import STEPS
from tests.training_runs import losses_of

LIMIT_S = 560.0


@pytest.mark.slow
@pytest.mark.ray
def test_fault_24_a_submitted_training_killed_with_its_cluster_continues_on_a_fresh_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("submitted_training_run.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    # The head's servers, the raylet, the job's driver, and the ranks among them.
    assert found["killed"] > 5
    assert (found["first_exit"] != 0, found["was_complete"], found["second_exit"]) == (True, False, 0)
    assert "train_mmdit: resume" in (tmp_path / "job.log").read_text()
    assert len(losses_of(tmp_path / "out")) == STEPS
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "quiet")
    one, other = ((tmp_path / name / "network.safetensors").read_bytes() for name in ("out", "quiet"))
    assert one == other
