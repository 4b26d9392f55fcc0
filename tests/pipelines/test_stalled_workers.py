"""Real faults in two Ray workers that no exception tells of: a stopped rank, and memory that runs out on one alone."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.training.adjustments import read_adjustments
from pipelines.training.journal import read_journal
from pipelines.training.loop import TrainingOrder
from pipelines.training.options import TrainingOptions
from pipelines.training.order_book import OrderBook
from pipelines.training.workers import WorkerGroup
from tests.toy_objective import HUNGER_BYTES, ToyObjective
from tests.training_runs import losses_of, run_training, two_workers

ROOT = Path(__file__).parents[2]
OPTIONS = TrainingOptions(steps=8, batch_size=8, lr=3e-2, clip=0.05, checkpoint_every=3, stall_timeout_s=15.0)


@pytest.fixture(scope="module")
def group(ray_cluster: None) -> Iterator[WorkerGroup]:
    # One loss of the workers is allowed: memory that runs out must not count as one.
    with two_workers(max_failures=1) as warm:
        yield warm


@pytest.mark.slow
@pytest.mark.ray
def test_fault_25_a_stopped_rank_is_named_and_ended_and_the_run_goes_on_as_if_nothing_had_been(
    features: str, group: WorkerGroup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mark = tmp_path / "stopped"
    hanging = ToyObjective(features=features, stop_at=4, stop_file=str(mark))
    with caplog.at_level(logging.WARNING, logger="pipelines.training.workers"):
        result = run_training(hanging, OPTIONS, tmp_path / "hung", group=group)
    assert result.steps == 8
    assert not Path(f"/proc/{mark.read_text()}").exists()
    named = [record.getMessage() for record in caplog.records if "made no progress" in record.getMessage()]
    assert len(named) == 1
    assert "hung: rank 1 (last heard from" in named[0]
    assert "for 15 s in step 5, where the others wait (backward)" in named[0]
    run_training(hanging.faultless(), OPTIONS, tmp_path / "quiet", group=group)
    assert losses_of(tmp_path / "hung") == losses_of(tmp_path / "quiet")
    one, other = ((tmp_path / name / "toy.safetensors").read_bytes() for name in ("hung", "quiet"))
    assert one == other


@pytest.mark.slow
@pytest.mark.ray
def test_fault_27_memory_that_runs_out_on_one_rank_gives_smaller_micro_batches_on_both(
    features: str, group: WorkerGroup, tmp_path: Path
) -> None:
    calm = ToyObjective(features=features, loss_is_mean=True)
    hungry = ToyObjective(features=features, loss_is_mean=True, hungry_from=4, memory_bytes=5 * HUNGER_BYTES // 2)
    result = run_training(hungry, OPTIONS, tmp_path / "hungry", group=group)
    run_training(calm, OPTIONS, tmp_path / "calm")
    assert result.notes == ["out of memory: micro batches of at most 2 on a worker, same global batch"]
    assert read_adjustments(tmp_path / "hungry" / "checkpoints").max_micro_size == 2
    assert losses_of(tmp_path / "hungry") == pytest.approx(losses_of(tmp_path / "calm"), rel=5e-6)
    records = read_journal(tmp_path / "hungry" / "metrics.jsonl")
    assert [record.get("accumulation") for record in records] == [None] * 3 + [2] * 5


def test_an_attempt_that_memory_ended_does_not_count_and_one_that_was_lost_does() -> None:
    book = OrderBook(max_failures=1)
    number = book.place(TrainingOrder(ToyObjective(features="f"), OPTIONS, "out"))
    for _ in range(5):
        assert book.begin(number)
        book.excuse(number)
        book.excuse(number)
    assert [book.begin(number) for _ in range(3)] == [True, True, False]
