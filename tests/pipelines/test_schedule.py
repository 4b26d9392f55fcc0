"""The learning rate at the steps where its value is known."""

import pytest

from pipelines.training.schedule import Schedule


def test_warm_up_rises_linearly_to_the_peak() -> None:
    schedule = Schedule(peak=1e-4, total_steps=5000, warmup_steps=1000)
    assert schedule(0) == pytest.approx(1e-4 / 1001)
    assert schedule(499) == pytest.approx(1e-4 * 500 / 1001)
    assert schedule(1000) == 1e-4
    assert schedule(4999) == 1e-4


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_floor() -> None:
    schedule = Schedule(peak=2e-3, total_steps=110, warmup_steps=10, name="cosine", floor=1e-4)
    assert schedule(10) == pytest.approx(2e-3)
    assert schedule(60) == pytest.approx((2e-3 + 1e-4) / 2)
    assert schedule(110) == pytest.approx(1e-4)
    assert schedule(500) == pytest.approx(1e-4)


def test_steps_decays_by_ten_twice_as_mmaudio_does() -> None:
    schedule = Schedule(peak=1e-4, total_steps=301_000, warmup_steps=1000, name="steps")
    assert schedule(1000 + 239_999) == pytest.approx(1e-4)
    assert schedule(1000 + 240_000) == pytest.approx(1e-5)
    assert schedule(1000 + 270_000) == pytest.approx(1e-6)
