"""How many workers a training may have, and what a global batch asks of their number."""

import pytest

from pipelines.errors import InputError
from pipelines.training.adjustments import Adjustments
from pipelines.training.loop import TrainingOrder
from pipelines.training.options import TrainingOptions
from pipelines.training.order_book import OrderBook
from pipelines.training.worker_range import WorkerRange
from tests.toy_objective import ToyObjective


@pytest.mark.parametrize(("text", "least", "most"), [(0, 0, 0), (3, 3, 3), ("3", 3, 3), ("2:8", 2, 8)])
def test_a_number_or_a_range_is_read_and_said_again(text: int | str, least: int, most: int) -> None:
    workers = WorkerRange.of(text)
    assert (workers.least, workers.most, str(workers)) == (least, most, str(text))
    assert workers.is_elastic == (least != most)


@pytest.mark.parametrize("text", ["", "2:", ":2", "-1", -1, "2-8", "8:2", "0:4", "1:2:3", "1.5"])
def test_what_is_neither_is_refused(text: int | str) -> None:
    with pytest.raises(InputError, match="--num-workers"):
        WorkerRange.of(text)


def test_a_batch_has_to_divide_by_every_number_that_may_come() -> None:
    WorkerRange.of("1:4").check_batch(48, 2)
    WorkerRange.of(0).check_batch(5, 5)
    with pytest.raises(
        InputError, match=r"--batch-size 16 does not divide by 3, 5 workers x 1 .* a multiple of 60, or"
    ):
        WorkerRange.of("2:5").check_batch(16, 1)
    with pytest.raises(InputError, match=r"--batch-size 12 does not divide by 3 workers x 3 .* a multiple of 36"):
        WorkerRange.of("1:4").check_batch(12, 3)


def test_fewer_workers_take_more_micro_batches_of_what_fits_the_whole_group() -> None:
    plans = {world: Adjustments().plan(48, world, 1, most_workers=4) for world in (1, 2, 3, 4)}
    assert {world: (plan.micro_size, plan.accumulation) for world, plan in plans.items()} == {
        **{1: (12, 4), 2: (12, 2), 3: (8, 2), 4: (12, 1)},
    }
    # What memory said on any number of workers holds on every other.
    after = Adjustments(max_micro_size=5)
    plans = {world: after.plan(48, world, 1, most_workers=4) for world in (1, 2, 4)}
    assert {world: plan.micro_size for world, plan in plans.items()} == {1: 4, 2: 4, 4: 4}
    # The rows of a validation batch stay whole: micro batches are parts of those that were asked for.
    assert Adjustments(max_micro_size=16).plan(48, 1, 2).micro_size == 12


def test_an_attempt_that_grew_does_not_count_and_one_that_shrank_does() -> None:
    book = OrderBook(max_failures=1)
    number = book.place(
        TrainingOrder(ToyObjective(features="f"), TrainingOptions(steps=1, batch_size=2, lr=1.0), "out")
    )
    assert book.begin(number, 2)
    assert all(book.begin(number, world) for world in (3, 4, 5))
    assert book.begin(number, 4)
    assert book.begin(number, 5)
    assert not book.begin(number, 4)


def test_ranks_of_a_larger_group_are_forgotten() -> None:
    book = OrderBook(max_failures=1)
    for rank in range(3):
        book.enrol(rank, 3, f"node {rank}")
    book.enrol(1, 2, "node 5")
    book.enrol(0, 2, "node 0")
    assert book.nodes() == {0: "node 0", 1: "node 5"}
