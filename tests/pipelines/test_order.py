"""The global order is a permutation an epoch, the same for any number of workers, and resumable anywhere; mixed too."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.training.order import BatchPlan, GlobalOrder, MixedOrder

SIZES = st.lists(st.integers(1, 64), min_size=1, max_size=12).map(tuple)


@given(sizes=SIZES, seed=st.integers(0, 2**31), epoch=st.integers(0, 1000), window=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_every_epoch_visits_every_row_exactly_once(sizes: tuple[int, ...], seed: int, epoch: int, window: int) -> None:
    order = GlobalOrder(sizes, seed, window)
    visited = sorted(map(tuple, order.epoch(epoch).tolist()))
    assert visited == [(group, row) for group, size in enumerate(sizes) for row in range(size)]


@given(sizes=SIZES, seed=st.integers(0, 2**31), window=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_rows_are_mixed_only_inside_windows_of_a_few_row_groups(sizes: tuple[int, ...], seed: int, window: int) -> None:
    groups = GlobalOrder(sizes, seed, window).epoch(0)[:, 0]
    first = {group: int(np.argmax(groups == group)) for group in range(len(sizes))}
    last = {group: int(np.flatnonzero(groups == group)[-1]) for group in range(len(sizes))}
    by_start = sorted(first, key=lambda group: first[group])
    opened = 0
    for start in range(0, len(by_start)):
        overlapping = [g for g in by_start if first[g] <= first[by_start[start]] <= last[g]]
        opened = max(opened, len(overlapping))
    assert opened <= window


def test_epochs_and_seeds_give_different_orders_and_the_same_ones_again() -> None:
    order = GlobalOrder((64,) * 8, seed=3)
    assert not np.array_equal(order.epoch(0), order.epoch(1))
    assert not np.array_equal(order.epoch(0), GlobalOrder((64,) * 8, seed=4).epoch(0))
    assert np.array_equal(order.epoch(5), GlobalOrder((64,) * 8, seed=3).epoch(5))


@given(
    step=st.integers(0, 10_000),
    worlds=st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 3, 4, 6])),
    accumulations=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
)
@settings(max_examples=60, deadline=None)
def test_a_global_batch_holds_the_same_positions_for_any_number_of_ranks_and_accumulation(
    step: int, worlds: tuple[int, int], accumulations: tuple[int, int]
) -> None:
    seen = []
    for world, accumulation in zip(worlds, accumulations, strict=True):
        plan = BatchPlan(48, world, accumulation)
        dealt = [plan.positions(step, rank) for rank in range(world)]
        assert {part.shape for part in dealt} == {(accumulation, plan.micro_size)}
        assert all((part % world == rank).all() for rank, part in enumerate(dealt) if 48 % world == 0)
        seen.append(sorted(np.concatenate([part.ravel() for part in dealt]).tolist()))
    assert seen[0] == seen[1] == list(range(step * 48, (step + 1) * 48))


def test_a_batch_that_does_not_divide_says_what_would() -> None:
    with pytest.raises(InputError, match=r"--batch-size 10 .* multiple of 4"):
        BatchPlan(10, 2, 2)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(InputError, match="no row"):
        GlobalOrder((), 0)


def test_the_order_of_one_dataset_is_the_one_that_trainings_under_way_have() -> None:
    order = GlobalOrder((64, 64, 22, 5), seed=11, window=2)
    assert order.finder()(np.arange(4)).tolist() == [[1, 27], [1, 6], [1, 1], [1, 33]]
    three = order.finder()(np.arange(3 * order.num_rows)).astype("<i8")
    pinned = "0e554ce71f5a0957462bd0e5d657a38a75175adb3d8a09a4e9d7dd2190f73dc2"
    assert hashlib.sha256(three.tobytes()).hexdigest() == pinned


@st.composite
def mixtures(draw: st.DrawFn) -> MixedOrder:
    sizes = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple), min_size=2, max_size=4))
    weights = draw(st.lists(st.integers(1, 7), min_size=len(sizes), max_size=len(sizes)))
    return MixedOrder(tuple(sizes), tuple(weights), draw(st.integers(0, 2**31)))


def _dataset_of(order: MixedOrder, places: np.ndarray) -> np.ndarray:
    """int64 [n]: the dataset of each place."""
    ends = np.cumsum([len(sizes) for sizes in order.group_sizes])
    return np.searchsorted(ends, places[:, 0], side="right")


@given(order=mixtures(), first=st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_every_block_holds_each_dataset_exactly_as_often_as_its_weight(order: MixedOrder, first: int) -> None:
    places = order.finder()(np.arange(first * order.block_length, (first + 5) * order.block_length))
    for block in _dataset_of(order, places).reshape(5, -1):
        assert tuple(np.bincount(block, minlength=len(order.weights))) == order.weights


@given(order=mixtures())
@settings(max_examples=30, deadline=None)
def test_each_dataset_is_read_in_an_order_of_its_own_each_row_once_an_epoch(order: MixedOrder) -> None:
    longest = max(-(-sum(sizes) // weight) for sizes, weight in zip(order.group_sizes, order.weights, strict=True))
    places = order.finder()(np.arange(2 * longest * order.block_length))
    datasets = _dataset_of(order, places)
    before = 0
    for which, sizes in enumerate(order.group_sizes):
        mine = places[datasets == which] - (before, 0)
        before += len(sizes)
        assert mine.tolist() == order.orders[which].finder()(np.arange(len(mine))).tolist()
        for epoch in np.split(mine, range(sum(sizes), len(mine), sum(sizes))):
            assert len(set(map(tuple, epoch.tolist()))) == len(epoch)
        every = sorted(map(tuple, mine[: sum(sizes)].tolist()))
        assert every == [(group, row) for group, size in enumerate(sizes) for row in range(size)]


@given(order=mixtures(), start=st.integers(0, 200), worlds=st.permutations([1, 2, 3]))
@settings(max_examples=20, deadline=None)
def test_a_mixed_batch_is_the_same_for_any_number_of_ranks_and_from_any_step_on(
    order: MixedOrder, start: int, worlds: list[int]
) -> None:
    whole = order.finder()(np.arange((start + 2) * 12))[-12:]
    for world in worlds:
        plan = BatchPlan(12, world)
        for rank in range(world):
            # A finder of its own, which begins here: nothing before it is needed.
            places = order.finder()(plan.positions(start + 1, rank).ravel())
            assert places.tolist() == whole[rank::world].tolist()


def test_mixed_orders_of_other_seeds_and_datasets_are_other_ones() -> None:
    order = MixedOrder(((64, 64), (64, 64)), (2, 1), seed=5)
    other = replace(order, seed=6)
    assert not np.array_equal(order.finder()(np.arange(90)), other.finder()(np.arange(90)))
    first, second = (own.epoch(0) for own in order.orders)
    assert not np.array_equal(first, second)
    blocks = {tuple(order.block(index)[:, 0].tolist()) for index in range(30)}
    assert blocks == {(0, 0, 1), (0, 1, 0), (1, 0, 0)}
