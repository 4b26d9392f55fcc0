"""Two Ray Train workers in one warm group: every ZeRO stage, a killed worker, a defect, one after another.

One group serves the whole file, as it serves a whole launch.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from models.weights import load_weights
from pipelines.data.units import HERE, Pool, cut_units
from pipelines.errors import InputError, PipelineError
from pipelines.training.journal import read_journal
from pipelines.training.loop import TrainingOrder, TrainingResult
from pipelines.training.options import TrainingOptions
from pipelines.training.order_book import OrderBook
from pipelines.training.workers import WorkerGroup, warm_workers
from tests.pipelines.test_units import Maker, clips
from tests.pipelines.test_units import run as run_test_units
from tests.toy_objective import ToyObjective
from tests.training_runs import losses_of, run_training, two_workers

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SETTINGS = {"steps": 8, "batch_size": 8, "lr": 3e-2, "clip": 0.05, "checkpoint_every": 3, "schedule": "cosine"}


@pytest.fixture(scope="module")
def group(ray_cluster: None) -> Iterator[WorkerGroup]:
    with two_workers(max_failures=2) as warm:
        yield warm


def _fit(
    objective: ToyObjective, out: Path, group: WorkerGroup | None, **settings: object
) -> tuple[TrainingResult, list[int]]:
    options = TrainingOptions(**{**SETTINGS, **settings})  # pyright: ignore[reportArgumentType]
    told: list[int] = []
    return run_training(objective, options, out, group=group, report=lambda step, metrics: told.append(step)), told


@pytest.fixture(scope="module")
def alone(features: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training that the others are compared with: one rank, in this process."""
    out = tmp_path_factory.mktemp("alone")
    _fit(ToyObjective(features=features), out, None)
    return out


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_workers_give_the_losses_and_weights_of_one_at_every_zero_stage(
    features: str, alone: Path, group: WorkerGroup, tmp_path: Path, stage: int
) -> None:
    result, told = _fit(ToyObjective(features=features), tmp_path, group, zero_stage=stage)
    assert (result.steps, told) == (8, list(range(1, 9)))
    # The toy's loss has a term over the whole global batch: only a gather with the right gradient gives these.
    assert losses_of(tmp_path) == pytest.approx(losses_of(alone), rel=5e-6)
    exported, expected = load_weights(tmp_path / "toy.safetensors"), load_weights(alone / "toy.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-4, atol=1e-6)
    assert set(group.nodes()) == {0, 1}


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_both(
    features: str, group: WorkerGroup, tmp_path: Path, stage: int
) -> None:
    settings = {"zero_stage": stage, "steps": 5, "checkpoint_every": 100}
    result, _ = _fit(ToyObjective(features=features, bad_steps=(1, 3)), tmp_path, group, **settings)
    assert result.skipped_steps == 2
    assert [record["skipped"] for record in read_journal(tmp_path / "metrics.jsonl")] == [0, 1, 0, 1, 0]
    assert all(torch.isfinite(value).all() for value in load_weights(tmp_path / "toy.safetensors").values())


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_changes_nothing(features: str, group: WorkerGroup, tmp_path: Path) -> None:
    mark = tmp_path / "killed"
    faulty = ToyObjective(features=features, kill_at=4, kill_file=str(mark))
    result, _ = _fit(faulty, tmp_path / "killed_run", group, zero_stage=1)
    assert int(mark.read_text()) > 0
    whole, _ = _fit(faulty.faultless(), tmp_path / "whole", group, zero_stage=1)
    assert losses_of(tmp_path / "killed_run") == losses_of(tmp_path / "whole")
    assert result.metrics == whole.metrics
    for name, value in load_weights(tmp_path / "whole" / "toy.safetensors").items():
        assert torch.equal(load_weights(tmp_path / "killed_run" / "toy.safetensors")[name], value)


def test_units_done_by_the_group_are_those_done_here(group: WorkerGroup, tmp_path: Path) -> None:
    units = cut_units(clips(13), size=2)
    here = run_test_units(tmp_path / "here", units, HERE)
    there = run_test_units(tmp_path / "there", units, Pool(num_workers=2, group=group))
    assert (there["digest"], there["counts"]) == (here["digest"], {"in": 13, "out": 12, "rejected": 1})


@pytest.mark.slow
def test_units_are_finished_though_a_worker_dies_and_an_error_arrives_as_itself(
    group: WorkerGroup, tmp_path: Path
) -> None:
    units, pool = cut_units(clips(13), size=2), Pool(num_workers=2, group=group)
    mark = tmp_path / "died"
    survived = run_test_units(tmp_path / "survived", units, pool, partial(Maker, marker=str(mark)))
    assert mark.exists()
    assert survived["digest"] == run_test_units(tmp_path / "here", units, HERE)["digest"]
    with pytest.raises(InputError, match="another size"):
        run_test_units(tmp_path / "error", units, pool, partial(Maker, raises=True))


@pytest.mark.slow
def test_a_defect_is_told_once_and_the_group_goes_on(features: str, group: WorkerGroup, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="KeyError in a worker: 'a defect in the objective'"):
        _fit(ToyObjective(features=features, defect_at=2), tmp_path / "defect", group)
    result, _ = _fit(ToyObjective(features=features), tmp_path / "next", group, steps=2)
    assert result.steps == 2


def test_a_group_that_the_cluster_can_never_hold_is_refused(ray_cluster: None) -> None:
    with pytest.raises(InputError, match="--num-workers 500: the cluster has 2 CPUs"), warm_workers(500):
        pass


def test_the_order_book_gives_up_on_a_training_that_keeps_losing_its_workers() -> None:
    book = OrderBook(max_failures=2)
    order = TrainingOrder(ToyObjective(features="f"), TrainingOptions(steps=1, batch_size=2, lr=1.0), "out")
    number = book.place(order)
    assert book.next(-1) == ("work", number, order)
    assert [book.begin(number) for _ in range(4)] == [True, True, True, False]
    _, error, exit_code, _ = book.state(number)
    assert "died 3 times" in str(error)
    assert exit_code == 3
    assert book.next(-1)[0] == "wait"
    book.close()
    assert book.next(-1)[0] == "stop"


def test_workers_may_be_lost_for_ever_as_long_as_each_attempt_gets_a_step_further() -> None:
    book = OrderBook(max_failures=1)
    order = TrainingOrder(ToyObjective(features="f"), TrainingOptions(steps=99, batch_size=2, lr=1.0), "out")
    number = book.place(order)
    for attempt in range(10):
        assert book.begin(number)
        for step in range(attempt, attempt + 3):
            book.report(number, step, {})
    # Steps that were taken before count for nothing.
    assert book.begin(number)
    book.report(number, 5, {})
    assert not book.begin(number)
