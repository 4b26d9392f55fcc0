"""The parts of a step add up to it, and its cost follows from known numbers."""

import math
from pathlib import Path

import pytest
import torch

from pipelines.training.journal import read_journal
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder
from pipelines.training.options import TrainingOptions
from pipelines.training.timing import DeviceLoad, StepClock, StepMeter
from tests.feature_factory import write_features
from tests.toy_objective import ToyObjective

PARTS = ("data_s", "forward_s", "backward_s", "optimizer_s")


def test_a_part_that_is_entered_twice_is_added_up_and_a_new_step_starts_from_nothing() -> None:
    clock = StepClock(torch.device("cpu"))
    with clock.part("forward"):
        pass
    once = clock.end_step()
    assert list(once) == ["forward_s"]
    assert clock.end_step() == {}


def test_cost_follows_from_rate_bytes_and_operations() -> None:
    load = DeviceLoad(sample_flops=10**12, peak_flops=8e12)
    meter = StepMeter(batch_size=8, world_size=2, first_step=0, total_steps=10, load=load)
    found = meter.metrics(9, 2.0, {"data_s": 0.5}, 3e6)
    expected = {
        "data_s": 0.5,
        "step_s": 2.0,
        "samples_per_s": 4.0,
        "data_share": 0.25,
        "sample_bytes": 3e6,
        "data_mb_per_s": 12.0,
        "time_left_s": 0.0,
        "tflops_per_s": 2.0,
        "mfu": 0.25,
    }
    assert found == pytest.approx(expected)


def test_a_device_that_is_not_known_shows_no_mfu() -> None:
    meter = StepMeter(batch_size=8, world_size=2, first_step=0, total_steps=10, load=None)
    assert "mfu" not in meter.metrics(0, 1.0, {}, 1.0)


def test_the_journal_tells_where_every_step_went(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", {"train": 40, "val": 16})
    out = tmp_path / "out"
    out.mkdir()
    options = TrainingOptions(steps=4, batch_size=8, lr=1e-2, accumulation=2)
    fit(TrainingOrder(ToyObjective(features=str(features)), options, str(out)), num_workers=0, report=lambda s, m: None)
    records = read_journal(out / "metrics.jsonl")
    assert len(records) == 4
    for record in records:
        parts = [record[name] for name in PARTS]
        assert all(part is not None and part > 0 for part in parts)
        step_s, left_s = record["step_s"], record["time_left_s"]
        assert step_s is not None
        assert left_s is not None
        assert sum(part or 0 for part in parts) <= step_s
        assert (left_s == 0) == (record["step"] == 4)
        # text_features [8, 64] float16 and latent_mean [40, 160] float32; validity bits and the name come on top.
        size_bytes = record["sample_bytes"]
        assert size_bytes is not None
        assert math.isclose(size_bytes, 8 * 64 * 2 + 40 * 160 * 4, rel_tol=0.05)
