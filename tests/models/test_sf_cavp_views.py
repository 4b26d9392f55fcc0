"""The views of a batch: crops that fit, hard ones last, and a generator's versions in the place of edits."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from models.crops import plan_crops
from models.hard_negatives import BACKGROUND_DRAWS, EDIT_DRAWS, JOIN_DRAWS
from models.sf_cavp import SF_CAVP_SIZES, SFCAVP, normalise_loudness
from models.sf_cavp_views import LOSS_CONFIGS, Degraded, LossConfig, draw_uniforms, make_views
from tests.models.flashes import flashes_and_clicks, generators, hard_draws

TINY = LOSS_CONFIGS["tiny"]
PLAIN = dataclasses.replace(TINY, join_probability=0.0)


def test_the_views_are_a_function_of_each_samples_own_draws() -> None:
    model = SFCAVP(SF_CAVP_SIZES["tiny"])
    frames, waves = flashes_and_clicks(4)
    config = dataclasses.replace(TINY, join_probability=0.0)
    views = make_views(model, frames, waves, hard_draws(4, config), config)
    assert views.frames.shape == (4, 24, 3, 32, 32)
    assert views.sounds.shape == (4, 4, 64, 96)
    again = make_views(model, frames, waves, hard_draws(4, config), config)
    assert torch.equal(views.sounds, again.sounds)
    two = slice(1, 4, 2)
    half = make_views(model, frames[two], waves[two], hard_draws(4, config)[two], config)
    assert torch.equal(half.frames, views.frames[two])
    assert torch.equal(half.offset, views.offset[two])
    torch.testing.assert_close(half.sounds[:, 0], views.sounds[two, 0])


def test_the_aligned_sound_is_that_of_the_pictures_crop() -> None:
    """A click every flash: where the picture is bright, the aligned sound is loud."""
    model = SFCAVP(SF_CAVP_SIZES["tiny"])
    frames, waves = flashes_and_clicks(16)
    views = make_views(model, frames, waves, hard_draws(16, TINY), TINY)
    bright = views.frames.mean(dim=(2, 3, 4)) > 0.5
    loudness = views.sounds[:, 0].amax(dim=1).reshape(16, 24, 4).amax(dim=2)
    assert loudness[bright].median() > loudness[~bright].median() + 2


def test_samples_are_easy_first_and_hard_in_the_end() -> None:
    config = dataclasses.replace(TINY, easy_samples=100, ramp_samples=100)
    shares = [
        draw_uniforms(generators(200), [position] * 200, config)[:, 0].mean().item() for position in (0, 100, 150, 201)
    ]
    assert shares[0] == shares[1] == 0
    assert shares[2] == pytest.approx(0.5, abs=0.15)
    assert shares[3] == 1
    assert config.hard_from == 200


def worsened(waves: Tensor, num_versions: int = 3) -> Tensor:
    """More and more noise over each wave: [B, K, S]."""
    noise = torch.randn(len(waves), num_versions, waves.shape[1], generator=torch.Generator().manual_seed(1))
    return waves[:, None] + 0.02 * torch.arange(1, num_versions + 1)[:, None] * noise


def with_flat_background(u: Tensor, config: LossConfig) -> Tensor:
    """The draws with a background of -13 nats in every band, at all times, for every sound."""
    u = u.clone()
    crops = u[:, 1 + JOIN_DRAWS :].reshape(len(u), config.num_crops, -1)
    backgrounds = crops[:, :, 3 + config.num_edits * EDIT_DRAWS :]
    backgrounds[:] = 0.5
    backgrounds[:, :, ::BACKGROUND_DRAWS] = 0.0
    return u


@pytest.fixture(scope="module")
def model() -> SFCAVP:
    torch.manual_seed(0)
    return SFCAVP(SF_CAVP_SIZES["tiny"])


@pytest.mark.parametrize("num_crops", [1, 2])
def test_a_generators_versions_are_cut_where_the_picture_is_and_get_its_gain(model, num_crops) -> None:
    config = dataclasses.replace(PLAIN, num_crops=num_crops, crop_steps=16, min_crop_distance=8)
    frames, waves = flashes_and_clicks(4)
    u = with_flat_background(hard_draws(4, config), config)
    is_there = torch.tensor([False, True, False, True])
    worse = worsened(waves[is_there])
    views = make_views(model, frames, waves, u, config, Degraded(waves=worse, is_there=is_there))

    crops = u[:, 1 + JOIN_DRAWS :].reshape(4, num_crops, -1)
    plan = plan_crops(crops[..., 0], crops[..., 1], num_steps=40, crop_steps=16, min_distance=8, max_offset=12, grid=1)
    assert views.sounds.shape == (4 * num_crops, 4, 64, 64)
    for place, sample in enumerate((1, 3)):
        for crop in range(num_crops):
            start = int(plan.video_start[sample, crop])
            factor = 10 ** (6 * (2 * float(crops[sample, crop, 2]) - 1) / 10)
            row = views.sounds[sample * num_crops + crop]
            for k, wave in enumerate((waves[sample], *worse[place])):
                mel = model.log_mel(normalise_loudness(wave[None]))[0, :, 4 * start : 4 * (start + 16)]
                by_hand = ((mel.exp() - 1e-5).clamp(min=0) * factor + 1e-5 + math.exp(-13)).log()
                torch.testing.assert_close(row[k], by_hand, rtol=1e-4, atol=1e-4)


def test_the_background_lies_on_a_generators_versions_too(model) -> None:
    """It only ever adds, and on what is silent it alone is heard."""
    frames, waves = flashes_and_clicks(2)
    u, is_there = hard_draws(2, PLAIN), torch.tensor([True, False])
    silent = Degraded(waves=torch.zeros(1, 3, waves.shape[1]), is_there=is_there)
    sounds = make_views(model, frames, waves, u, PLAIN, silent).sounds[0]
    flat = make_views(model, frames, waves, with_flat_background(u, PLAIN), PLAIN, silent).sounds[0]
    floor = math.log(1e-5)
    assert (sounds[1:] > floor).all()
    torch.testing.assert_close(flat[1:], torch.full_like(flat[1:], math.log(1e-5 + math.exp(-13))))
    # Eight bands and ten times, of each version its own.
    assert all(not torch.equal(sounds[i], sounds[j]) for i, j in ((1, 2), (2, 3)))


def test_a_sample_with_degraded_sounds_is_never_joined_and_all_its_versions_are_wrong(model) -> None:
    config = dataclasses.replace(TINY, join_probability=1.0)
    frames, waves = flashes_and_clicks(4)
    u, is_there = hard_draws(4, config), torch.tensor([False, True, False, False])
    # As good as the real sound: that they are worse is known and not measured.
    same = Degraded(waves=waves[is_there][:, None].expand(-1, 3, -1), is_there=is_there)
    with_them = make_views(model, frames, waves, u, config, same)
    joined = make_views(model, frames, waves, u, config)
    alone = make_views(model, frames, waves, u, PLAIN)
    assert with_them.is_wrong[1].all()
    assert torch.equal(with_them.frames[1], alone.frames[1])
    assert torch.equal(with_them.sounds[1, 0], alone.sounds[1, 0])
    assert torch.equal(with_them.offset_mel[1], alone.offset_mel[1])
    assert not torch.equal(joined.sounds[1, 0], alone.sounds[1, 0])
    others = [0, 2, 3]
    assert torch.equal(with_them.frames[others], joined.frames[others])
    assert torch.equal(with_them.sounds[others, 0], joined.sounds[others, 0])


def test_the_other_samples_of_a_batch_are_as_without_degraded_ones(model) -> None:
    frames, waves = flashes_and_clicks(4)
    u, is_there = hard_draws(4, PLAIN), torch.tensor([False, False, True, False])
    plain = make_views(model, frames, waves, u, PLAIN)
    views = make_views(model, frames, waves, u, PLAIN, Degraded(waves=worsened(waves[is_there]), is_there=is_there))
    others = [0, 1, 3]
    for name in ("frames", "sounds", "is_wrong", "offset_mel", "offset"):
        assert torch.equal(vars(views)[name][others], vars(plain)[name][others]), name
    assert not torch.equal(views.sounds[2, 1:], plain.sounds[2, 1:])
    none = Degraded(waves=torch.zeros(0, 3, waves.shape[1]), is_there=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(make_views(model, frames, waves, u, PLAIN, none).sounds, plain.sounds)


def test_an_easy_sample_ignores_what_a_generator_made_of_it(model) -> None:
    frames, waves = flashes_and_clicks(4)
    u, is_there = hard_draws(4, PLAIN), torch.tensor([True, True, False, False])
    u[0, 0] = 0.0
    worse = worsened(waves[is_there])
    both = make_views(model, frames, waves, u, PLAIN, Degraded(waves=worse, is_there=is_there))
    second = make_views(
        model, frames, waves, u, PLAIN, Degraded(waves=worse[1:], is_there=torch.tensor([False, True, False, False]))
    )
    assert torch.equal(both.sounds, second.sounds)
    assert both.is_wrong[:2].tolist() == [[False] * 3, [True] * 3]
    u[:, 0] = 0.0
    easy = make_views(model, frames, waves, u, PLAIN, Degraded(waves=worse, is_there=is_there))
    assert easy.sounds.shape == (4, 1, 64, 96)
    assert not easy.is_wrong.any()


def test_another_number_of_versions_than_of_edits_is_a_defect_of_the_caller(model) -> None:
    frames, waves = flashes_and_clicks(2)
    is_there = torch.tensor([True, True])
    with pytest.raises(AssertionError, match="2 degraded versions, 3 are needed"):
        make_views(
            model, frames, waves, hard_draws(2, PLAIN), PLAIN, Degraded(waves=worsened(waves, 2), is_there=is_there)
        )
