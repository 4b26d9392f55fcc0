"""Preprocess and a training with two workers across two raylets, each shown to have run on both nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.data.contracts import FEATURES
from pipelines.data.store import Dataset
from pipelines.training.journal import read_journal

LIMIT_S = 560.0


@pytest.mark.slow
@pytest.mark.ray
def test_preprocess_and_training_run_on_both_nodes(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_nodes_run.py")
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
    assert len(found["nodes"]) == 2
    assert found["preprocess"] == found["nodes"]
    assert found["training"] == found["nodes"]
    assert found["steps"] == 4
    assert Dataset.open(str(tmp_path / "features"), FEATURES).splits == {"train": 140, "val": 8}
    assert [record["step"] for record in read_journal(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4]
