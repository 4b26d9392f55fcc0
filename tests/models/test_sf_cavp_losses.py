"""SF-CAVP's losses: known answers, both directions, ranks that agree, and that a few steps learn."""

import dataclasses
import math
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.sf_cavp import SF_CAVP_SIZES, SFCAVP, parameter_groups
from models.sf_cavp_losses import (
    group_shares,
    offset_loss,
    onset_weights,
    ranking_loss,
    segment_loss,
    semantic_loss,
    sf_cavp_loss,
)
from models.sf_cavp_views import LOSS_CONFIGS, Degraded, LossConfig, draw_uniforms, make_views
from tests.models.flashes import flashes_and_clicks, generators, hard_draws

TINY = LOSS_CONFIGS["tiny"]
NO_EDITS = torch.zeros(4, 0)


def identity(x: Tensor) -> Tensor:
    return x


def units(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_semantic_loss_is_infonce_in_both_directions() -> None:
    video, audio, scale = units(4, 8), units(4, 8, seed=1), torch.tensor(10.0)
    rows = torch.arange(4)
    logits = 10 * video @ audio.T
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    none = torch.zeros(4, 0, dtype=torch.bool)
    torch.testing.assert_close(semantic_loss(video, audio, NO_EDITS, none, scale, 1), expected)
    assert not torch.isclose(F.cross_entropy(logits, rows), F.cross_entropy(logits.T, rows))


def test_other_crops_of_the_same_video_are_no_negatives() -> None:
    """Two crops a video, all crops of a video identical: with them as negatives the loss could not fall below ln 2."""
    vectors = torch.eye(3, 8).repeat_interleave(2, dim=0)
    none = torch.zeros(6, 0, dtype=torch.bool)
    scale = torch.tensor(100.0)
    assert semantic_loss(vectors, vectors, torch.zeros(6, 0), none, scale, 2) < 1e-6
    assert semantic_loss(vectors, vectors, torch.zeros(6, 0), none, scale, 1) > 0.99 * math.log(2)


def test_edits_are_columns_of_their_own_picture_unless_they_changed_nothing() -> None:
    video, scale = torch.eye(4, 8), torch.tensor(5.0)
    edited = torch.full((4, 2), 0.9)
    with_edits = semantic_loss(video, video, edited, torch.ones(4, 2, dtype=torch.bool), scale, 1)
    without = semantic_loss(video, video, edited, torch.zeros(4, 2, dtype=torch.bool), scale, 1)
    to_audio = math.log(math.exp(5) + 3 + 2 * math.exp(4.5)) - 5
    to_video = math.log(math.exp(5) + 3) - 5
    assert with_edits.item() == pytest.approx((to_audio + to_video) / 2, rel=1e-5)
    assert without.item() == pytest.approx(to_video, rel=1e-5)


def test_the_offset_loss_knows_the_true_offset_and_shares_a_little_with_its_neighbours() -> None:
    offsets = torch.arange(-2, 3)
    similarity = torch.tensor([[0.1, 0.2, 0.9, 0.3, 0.0]])
    log_p = F.log_softmax(10 * similarity, dim=1)[0]
    plain = offset_loss(similarity, torch.tensor([0]), offsets, torch.tensor(10.0), 0.0)
    assert plain.item() == pytest.approx(-log_p[2].item())
    smoothed = offset_loss(similarity, torch.tensor([0]), offsets, torch.tensor(10.0), 0.2)
    assert smoothed.item() == pytest.approx(-(0.8 * log_p[2] + 0.1 * log_p[1] + 0.1 * log_p[3]).item())
    at_the_edge = offset_loss(similarity, torch.tensor([-2]), offsets, torch.tensor(10.0), 0.2)
    assert at_the_edge.item() == pytest.approx(-(0.8 * log_p[0] + 0.2 * log_p[1]).item())


def test_the_segment_loss_tells_segments_of_one_video_apart_in_both_directions() -> None:
    video, scale = units(2, 24, 8).repeat_interleave(1, dim=0), torch.tensor(50.0)
    aligned = segment_loss(video, video, scale, 8)
    rolled = segment_loss(video, torch.roll(video, 8, dims=1), scale, 8)
    assert aligned.shape == (2,)
    assert (aligned < rolled).all()
    pooled = [F.normalize(x.reshape(2, 3, 8, 8).mean(dim=2), dim=-1) for x in (video, torch.roll(video, 8, dims=1))]
    logits = 50 * pooled[0] @ pooled[1].transpose(1, 2)
    expected = [(F.cross_entropy(one, torch.arange(3)) + F.cross_entropy(one.T, torch.arange(3))) / 2 for one in logits]
    torch.testing.assert_close(rolled, torch.stack(expected))


def test_the_ranking_loss_is_the_likelihood_of_the_right_order() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    wrong = torch.ones(1, 2, dtype=torch.bool)
    e = [math.exp(s) for s in (3.0, 2.0, 1.0)]
    expected = -(math.log(e[0] / sum(e)) + math.log(e[1] / (e[1] + e[2]))) / 2
    assert ranking_loss(scores, wrong, torch.tensor(1.0)).item() == pytest.approx(expected, rel=1e-5)
    assert ranking_loss(scores.flip(1), wrong, torch.tensor(1.0)).item() > expected


def test_an_edit_that_changed_nothing_is_not_ranked_below_its_predecessor() -> None:
    scores = torch.tensor([[1.0, 5.0, 0.0]], requires_grad=True)
    wrong = torch.tensor([[False, True]])
    ranking_loss(scores, wrong, torch.tensor(1.0)).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, 0] < 0  # real is better than version 2
    assert scores.grad[0, 1] < 0  # so is version 1, which is as good as real
    assert scores.grad[0, 2] > 0


def test_degraded_samples_weigh_as_much_together_as_all_others() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0, 9.0])
    few = torch.tensor([False, False, True, False])
    assert (group_shares(few, identity) * losses).mean().item() == pytest.approx((1 + 2 + 9) / 3 + 6)
    for alike in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        assert torch.equal(group_shares(alike, identity), torch.ones(4))
    # Another rank has none: this one's weigh more, that one's less, and the mean over ranks is the same.
    both = torch.cat([few, torch.zeros(4, dtype=torch.bool)])
    here, there = (group_shares(own, lambda _: both.float()) for own in (few, both[4:]))
    mean = ((here * losses).mean() + (there * losses).mean()) / 2
    assert mean.item() == pytest.approx((1 + 2 + 9 + losses.sum().item()) / 7 + 6)


def test_steady_sound_weighs_little_in_the_timing_loss() -> None:
    steady = torch.zeros(1, 64, 96) + 0.01 * torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(0))
    busy = steady.clone()
    busy[:, :, ::16] += 3.0
    weights = onset_weights(torch.cat([steady, busy, busy]), identity)
    assert weights[0] == pytest.approx(0.2)
    assert weights[1] == pytest.approx(1.0)


def together(losses: list[Callable[[Callable[[Tensor], Tensor]], Tensor]]) -> Tensor:
    """Run every rank's loss in a thread of its own; `gather` joins their live tensors, as an all-gather whose backward
    sums over ranks does. Returns the mean of the losses, whose gradient is what data-parallel training applies."""
    barrier, slots, results = (
        threading.Barrier(len(losses)),
        [torch.zeros(0)] * len(losses),
        [torch.zeros(0)] * len(losses),
    )

    def run(rank: int) -> None:
        def gather(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait(timeout=60)
            joined = torch.cat(slots)
            barrier.wait(timeout=60)
            return joined

        results[rank] = losses[rank](gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(losses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.stack(results).mean()


@pytest.mark.parametrize(("form", "num_crops", "degraded_rows"), [("offset", 1, []), ("segment", 2, [2, 6])])
def test_two_ranks_compute_the_loss_and_the_gradient_of_one(form, num_crops, degraded_rows) -> None:
    """Degraded sounds, where there are some, all lie on the first rank."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        TINY, num_crops=num_crops, min_crop_distance=8, temporal_form=form, join_probability=0.5, crop_steps=16
    )
    model = SFCAVP(SF_CAVP_SIZES["tiny"])
    frames, waves = flashes_and_clicks(8)
    model.fit(frames, waves)
    u = hard_draws(8, config)
    is_degraded = torch.zeros(8, dtype=torch.bool)
    is_degraded[degraded_rows] = True
    noise = torch.randn(8, config.num_edits, waves.shape[1], generator=torch.Generator().manual_seed(1))
    worse = waves[:, None] + torch.tensor([0.01, 0.03, 0.1])[:, None] * noise

    def of(rows: Tensor) -> Callable[[Callable[[Tensor], Tensor]], Tensor]:
        degraded = Degraded(waves=worse[rows[is_degraded[rows]]], is_there=is_degraded[rows])
        return lambda gather: sf_cavp_loss(model, frames[rows], waves[rows], u[rows], gather, config, degraded)[0]

    results = []
    for parts in ([torch.arange(8)], [torch.arange(0, 8, 2), torch.arange(1, 8, 2)]):
        model.zero_grad()
        loss = together([of(rows) for rows in parts])
        loss.backward()
        results.append(
            (loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (one_loss, one), (two_loss, two) = results
    assert two_loss == pytest.approx(one_loss, rel=1e-5)
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7)


def test_an_easy_batch_is_plain_and_gathers_the_same_shapes_as_a_hard_one() -> None:
    torch.manual_seed(0)
    model = SFCAVP(SF_CAVP_SIZES["tiny"])
    frames, waves = flashes_and_clicks(4)
    model.fit(frames, waves)
    shapes: dict[str, list[torch.Size]] = {"easy": [], "hard": []}
    for name, position in (("easy", 0), ("hard", TINY.hard_from)):

        def gather(x: Tensor, name: str = name) -> Tensor:
            shapes[name].append(x.shape)
            return x

        u = draw_uniforms(generators(4), [position] * 4, TINY)
        loss, metrics = sf_cavp_loss(model, frames, waves, u, gather, TINY)
        assert torch.isfinite(loss)
        assert (metrics["ranking_fast"] > 0) == (name == "hard")
    assert shapes["easy"] == shapes["hard"]
    plain = make_views(model, frames, waves, draw_uniforms(generators(4), [0] * 4, TINY), TINY)
    assert plain.sounds.shape == (4, 1, 64, 96)
    assert not plain.is_wrong.any()


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = SFCAVP(SF_CAVP_SIZES["tiny"])
    frames, waves = flashes_and_clicks(4)
    model.fit(frames, waves)
    loss, metrics = sf_cavp_loss(model, frames, waves, hard_draws(4, TINY), identity, TINY)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(not value.requires_grad and value.ndim == 0 for value in metrics.values())


def test_a_few_steps_learn_when_things_sound() -> None:
    torch.manual_seed(0)
    model = SFCAVP(SF_CAVP_SIZES["tiny"])
    frames, waves = flashes_and_clicks(16)
    model.fit(frames, waves)
    config = LossConfig(crop_steps=24, max_offset_steps=12, offset_grid=1, num_edits=1, join_probability=0.0)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=3e-3)
    history = []
    for step in range(25):
        u = hard_draws(16, config, first=100 * step)
        loss, metrics = sf_cavp_loss(model, frames, waves, u, identity, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(metrics["temporal"].item())
    assert sum(history[-5:]) / 5 < 0.8 * sum(history[:3]) / 3
