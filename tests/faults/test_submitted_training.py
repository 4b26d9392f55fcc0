"""A training is lost with the whole cluster that it was submitted to; the same command on another one continues it."""

import json
from pathlib import Path

import pytest

from tests.faults.submitted_training_run import STEPS
from tests.own_process import run_with_own_ray
from tests.training_runs import losses_of


@pytest.mark.slow
@pytest.mark.ray
def test_fault_24_a_submitted_training_killed_with_its_cluster_continues_on_a_fresh_one(tmp_path: Path) -> None:
    run_with_own_ray(Path(__file__).with_name("submitted_training_run.py"), tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    # The head's servers, the raylet, the job's driver, and the ranks among them.
    assert found["killed"] > 5
    assert (found["first_exit"] != 0, found["was_complete"], found["second_exit"]) == (True, False, 0)
    assert "train_mmdit: resume" in (tmp_path / "job.log").read_text()
    assert len(losses_of(tmp_path / "out")) == STEPS
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "quiet")
    one, other = ((tmp_path / name / "network.safetensors").read_bytes() for name in ("out", "quiet"))
    assert one == other
