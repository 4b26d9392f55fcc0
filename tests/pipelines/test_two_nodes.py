"""Preprocess and a training with two workers across two raylets, each shown to have run on both nodes."""

import json
from pathlib import Path

import pytest

from pipelines.data.contracts import FEATURES
from pipelines.data.store import Dataset
from pipelines.training.journal import read_journal
from tests.own_process import run_with_own_ray


@pytest.mark.slow
@pytest.mark.ray
def test_preprocess_and_training_run_on_both_nodes(tmp_path: Path) -> None:
    run_with_own_ray(Path(__file__).with_name("two_nodes_run.py"), tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["nodes"]) == 2
    assert found["preprocess"] == found["nodes"]
    assert found["training"] == found["nodes"]
    assert found["steps"] == 4
    assert Dataset.open(str(tmp_path / "features"), FEATURES).splits == {"train": 140, "val": 8}
    assert [record["step"] for record in read_journal(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4]
