"""A training of one to two workers loses a node and gets another one, and ends as one that nothing disturbed."""

from pathlib import Path

import pytest
import torch

from models.weights import load_weights
from pipelines.training.journal import read_journal
from tests.own_process import run_with_own_ray
from tests.pipelines.elastic_run import BATCH, STEPS


def _keys(out: Path) -> set[tuple[int, str]]:
    """(position, clip) of the steps that were taken."""
    lines = [line.split() for path in (out / "keys").iterdir() for line in path.read_text().splitlines()]
    return {(int(position), clip) for position, clip in lines if int(position) < STEPS * BATCH}


@pytest.mark.slow
@pytest.mark.ray
def test_fault_22_a_training_goes_on_without_a_lost_node_and_grows_when_one_comes(tmp_path: Path) -> None:
    # After a loss Ray may try the old size first; by default it does so for a minute.
    patience = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
    run_with_own_ray(Path(__file__).with_name("elastic_run.py"), tmp_path, **patience)
    records, quiet = (read_journal(tmp_path / name / "metrics.jsonl") for name in ("elastic", "quiet"))
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    # Each group began at the newest checkpoint of the one before, of steps 3 and 9.
    assert [record["workers"] for record in records] == [2] * 3 + [1] * 6 + [2] * 9
    # The micro batch stays that of two workers.
    assert [record.get("accumulation") for record in records] == [2 if r["workers"] == 1 else None for r in records]
    # As in test_worlds: two workers add in another order than one.
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in quiet], rel=2e-6)
    assert records[-1]["val_loss"] == pytest.approx(quiet[-1]["val_loss"], rel=2e-6)
    weights = load_weights(tmp_path / "elastic" / "toy.safetensors")
    for name, value in load_weights(tmp_path / "quiet" / "toy.safetensors").items():
        assert torch.allclose(weights[name], value, rtol=0, atol=2e-5)
    assert len(_keys(tmp_path / "quiet")) == STEPS * BATCH
    assert _keys(tmp_path / "elastic") == _keys(tmp_path / "quiet")
