"""The global order is a permutation an epoch, the same for any number of workers, and resumable anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.training.order import BatchPlan, GlobalOrder

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
