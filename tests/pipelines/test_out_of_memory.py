"""Memory that really runs out in a step: smaller micro batches, the same samples and losses, or a clear stop."""

import dataclasses
import weakref
from pathlib import Path

import pytest
import torch

from models.weights import load_weights
from pipelines.errors import EnvironmentFailed
from pipelines.training.adjustments import Adjustments, read_adjustments
from pipelines.training.flow_matching_objective import FlowMatchingObjective
from pipelines.training.journal import read_journal
from pipelines.training.objective import Trainee
from pipelines.training.options import TrainingOptions
from pipelines.training.out_of_memory import halve_micro_batch, is_out_of_memory
from pipelines.training.sf_cavp_objective import SFCAVPObjective
from tests.toy_objective import HUNGER_BYTES, ToyObjective, allocate_within
from tests.training_runs import losses_of, run_training

OPTIONS = TrainingOptions(steps=6, batch_size=8, lr=1e-2, clip=0.05, checkpoint_every=2, validate_every=3)
ROOM_BYTES = 5 * HUNGER_BYTES // 2
"""Two samples fit and three do not."""


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_fault_27_memory_that_runs_out_in_a_step_halves_the_micro_batch_until_it_fits_and_changes_no_loss(
    features: str, tmp_path: Path, stage: int
) -> None:
    options = dataclasses.replace(OPTIONS, zero_stage=stage)
    calm = ToyObjective(features=features, loss_is_mean=True)
    hungry = dataclasses.replace(calm, hungry_from=3, memory_bytes=ROOM_BYTES)
    result = run_training(hungry, options, tmp_path / "hungry")
    expected = run_training(calm, options, tmp_path / "calm")
    assert losses_of(tmp_path / "hungry") == pytest.approx(losses_of(tmp_path / "calm"), rel=5e-6)
    for name, value in load_weights(tmp_path / "calm" / "toy.safetensors").items():
        torch.testing.assert_close(load_weights(tmp_path / "hungry" / "toy.safetensors")[name], value)
    assert result.metrics["val_loss"] == pytest.approx(expected.metrics["val_loss"], rel=1e-5)
    # 8 samples, 4, 2: said, written into every record since, and kept by the checkpoints alone if need be.
    assert result.notes == ["out of memory: micro batches of at most 2 on a worker, same global batch"]
    records = read_journal(tmp_path / "hungry" / "metrics.jsonl")
    assert [record.get("accumulation") for record in records] == [None, None, 4, 4, 4, 4]
    (tmp_path / "hungry" / "checkpoints" / "adjustments.json").unlink()
    assert run_training(hungry, dataclasses.replace(options, steps=8), tmp_path / "hungry").steps == 8
    assert read_journal(tmp_path / "hungry" / "metrics.jsonl")[-1]["accumulation"] == 4


def test_fault_27_one_sample_that_does_not_fit_is_a_stop_that_says_what_to_do(features: str, tmp_path: Path) -> None:
    starved = ToyObjective(features=features, loss_is_mean=True, hungry_from=0, memory_bytes=HUNGER_BYTES // 2)
    with pytest.raises(EnvironmentFailed, match=r"out of memory with one sample at a time.*--zero-stage.*--dry-run"):
        run_training(starved, OPTIONS, tmp_path)
    assert read_adjustments(tmp_path / "checkpoints") == Adjustments(max_micro_size=1)


def test_fault_27_a_loss_over_the_whole_batch_is_not_changed_behind_anyones_back(features: str, tmp_path: Path) -> None:
    hungry = ToyObjective(features=features, hungry_from=3, memory_bytes=ROOM_BYTES)
    with pytest.raises(
        EnvironmentFailed, match=r"with 8 samples.*compares the samples of a batch.*nothing was changed"
    ):
        run_training(hungry, OPTIONS, tmp_path)
    assert not (tmp_path / "checkpoints" / "adjustments.json").exists()
    assert not SFCAVPObjective(start="", features="", size="tiny", sample_rate_hz=16000).loss_is_mean
    assert FlowMatchingObjective(start="", features="", size="tiny").loss_is_mean


def test_memory_that_runs_out_while_the_model_is_built_is_no_matter_of_batches(
    features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = ToyObjective(features=features, loss_is_mean=True)

    def build(self: ToyObjective, device: torch.device) -> None:
        allocate_within(4 * HUNGER_BYTES, HUNGER_BYTES)

    monkeypatch.setattr(ToyObjective, "build", build)
    with pytest.raises(EnvironmentFailed, match=r"out of memory outside the steps.*allocate"):
        run_training(objective, OPTIONS, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("stage", [0, 3])
def test_nothing_of_the_attempt_that_ran_out_is_still_there_when_the_next_one_begins(
    features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    built: list[weakref.ref[Trainee]] = []
    alive: list[int] = []
    build = ToyObjective.build

    def counted(self: ToyObjective, device: torch.device) -> Trainee:
        alive.append(sum(trainee() is not None for trainee in built))
        trainee = build(self, device)
        built.append(weakref.ref(trainee))
        return trainee

    monkeypatch.setattr(ToyObjective, "build", counted)
    hungry = ToyObjective(features=features, loss_is_mean=True, hungry_from=1, memory_bytes=ROOM_BYTES)
    run_training(hungry, dataclasses.replace(OPTIONS, zero_stage=stage, steps=2), tmp_path)
    assert alive == [0, 0, 0]


def test_what_is_no_lack_of_memory_is_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError) as real:
        allocate_within(2 * HUNGER_BYTES, HUNGER_BYTES)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    for other in (RuntimeError("Connection closed by peer"), EnvironmentFailed("not enough memory"), OSError(28, "x")):
        assert not is_out_of_memory(other)


def test_micro_batches_are_the_largest_that_divide_and_fit_for_any_number_of_workers() -> None:
    known = Adjustments(max_micro_size=4)
    plans = [known.plan(48, world, 1) for world in (1, 2, 3, 24)]
    assert [(plan.micro_size, plan.accumulation) for plan in plans] == [(4, 12), (4, 6), (4, 4), (2, 1)]
    assert Adjustments(max_micro_size=4).plan(10, 1, 1).micro_size == 2
    assert Adjustments().plan(48, 2, 3) == Adjustments(max_micro_size=8).plan(48, 2, 3)


def test_two_ranks_that_run_out_at_once_halve_once(tmp_path: Path) -> None:
    for _ in range(2):
        halve_micro_batch("out", tmp_path, 8, loss_is_mean=True)
    assert read_adjustments(tmp_path) == Adjustments(max_micro_size=4)
