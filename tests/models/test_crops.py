"""Crops: inside the clip, apart, with the offset that the plan says."""

import torch

from models.crops import cut, plan_crops


def planned(num_clips: int = 400, num_crops: int = 1, **changes: int):
    rules = {"num_steps": 40, "crop_steps": 24, "min_distance": 32, "max_offset": 12, "grid": 1} | changes
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(2, num_clips, num_crops, generator=generator)
    return plan_crops(u[0], u[1], **rules), rules


def test_crops_stay_inside_the_clip_and_offsets_inside_their_range() -> None:
    plan, _ = planned()
    for start in (plan.video_start, plan.audio_start):
        assert start.min() >= 0
        assert start.max() <= 16
    assert plan.offset.abs().max() == 12
    assert len(plan.offset.unique()) == 25


def test_offsets_lie_on_the_grid() -> None:
    plan, _ = planned(num_steps=128, crop_steps=64, max_offset=32, grid=2)
    assert (plan.offset % 2 == 0).all()
    assert plan.offset.abs().max() <= 32


def test_crops_of_one_video_start_two_seconds_apart() -> None:
    plan, _ = planned(num_crops=3, num_steps=160, crop_steps=64)
    assert (plan.video_start[:, 1:] - plan.video_start[:, :-1] >= 32).all()
    tight, _ = planned(num_crops=3, num_steps=128, crop_steps=64)
    assert tight.video_start.unique(dim=0).tolist() == [[0, 32, 64]]


def test_a_clip_as_long_as_the_crop_has_one_crop_and_no_offset() -> None:
    plan, _ = planned(num_steps=24)
    assert plan.video_start.max() == plan.offset.abs().max() == 0


def test_what_is_seen_at_t_is_heard_at_t_plus_offset() -> None:
    plan, _ = planned(num_clips=50, num_crops=2, num_steps=100, max_offset=20)
    clock = torch.arange(100).repeat(50, 1)
    seen, heard = cut(clock, plan.video_start, 24, dim=1), cut(clock, plan.audio_start, 24, dim=1)
    for picture, sound, offset in zip(seen, heard, plan.offset.flatten().tolist(), strict=True):
        for t in range(24):
            if 0 <= t + offset < 24:
                assert picture[t] == sound[t + offset]


def test_cutting_works_on_any_axis() -> None:
    x = torch.arange(2 * 3 * 10).reshape(2, 3, 10)
    pieces = cut(x, torch.tensor([[0, 5], [1, 6]]), 4, dim=2)
    assert torch.equal(pieces[1], x[0, :, 5:9])
    assert torch.equal(pieces[2], x[1, :, 1:5])
