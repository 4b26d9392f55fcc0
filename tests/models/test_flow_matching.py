import pytest
import torch

from models.flow_matching import (
    euler_sample,
    euler_sample_from,
    flow_matching_loss,
    interpolate,
    sample_condition_drops,
    sample_times,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_times_are_logit_normal() -> None:
    times = sample_times(20_000, _generator())
    assert times.min() > 0
    assert times.max() < 1
    logits = times.logit()
    assert logits.mean().item() == pytest.approx(0, abs=0.03)
    assert logits.std().item() == pytest.approx(1, abs=0.03)


def test_times_and_drops_repeat_from_a_seed() -> None:
    assert torch.equal(sample_times(8, _generator(3)), sample_times(8, _generator(3)))
    first, second = sample_condition_drops(64, _generator(3)), sample_condition_drops(64, _generator(3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_video_and_text_are_dropped_independently_one_time_in_ten() -> None:
    drop_video, drop_text = sample_condition_drops(50_000, _generator())
    assert drop_video.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert drop_text.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (drop_video & drop_text).float().mean().item() == pytest.approx(0.01, abs=0.003)


def test_the_path_runs_straight_from_noise_to_data() -> None:
    x0, x1 = torch.randn(2, 3, 5, 4, generator=_generator()).unbind(0)
    assert torch.equal(interpolate(x0, x1, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, x1, torch.ones(3)), x1)
    middle = interpolate(x0, x1, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(middle[1], 0.75 * x0[1] + 0.25 * x1[1])


def test_the_error_of_a_sample_is_the_mean_square_of_its_own_velocity_error() -> None:
    x0, x1 = torch.randn(2, 3, 5, 4, generator=_generator()).unbind(0)
    velocity = x1 - x0
    assert flow_matching_loss(velocity, x0, x1).tolist() == [0.0, 0.0, 0.0]
    offsets = torch.tensor([0.0, 1.0, 2.0])[:, None, None]
    torch.testing.assert_close(flow_matching_loss(velocity + offsets, x0, x1), torch.tensor([0.0, 1.0, 4.0]))


def test_a_bf16_velocity_is_compared_in_float32() -> None:
    x0, x1 = torch.zeros(1, 100, 10), torch.full((1, 100, 10), 1.0)
    error = flow_matching_loss(torch.full((1, 100, 10), 1.0078125, dtype=torch.bfloat16), x0, x1)
    assert error.dtype == torch.float32
    assert error.item() == pytest.approx(0.0078125**2, rel=1e-5)


@pytest.mark.parametrize("num_steps", [1, 8, 25])
def test_euler_is_exact_on_a_straight_field(num_steps: int) -> None:
    x0, x1 = torch.randn(2, 3, 5, 4, generator=_generator()).unbind(0)
    torch.testing.assert_close(euler_sample(lambda x, t: x1 - x0, x0, num_steps), x1)


def test_euler_visits_equal_steps_from_zero_and_takes_the_velocity_at_their_starts() -> None:
    seen: list[float] = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t[0].item())
        return x

    x = euler_sample(field, torch.ones(2, 1, 1), 4)
    assert seen == [0.0, 0.25, 0.5, 0.75]
    torch.testing.assert_close(x, torch.full((2, 1, 1), 1.25**4))


def test_euler_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        euler_sample(lambda x, t: x, torch.zeros(1, 1, 1), 0)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_from_any_start_euler_is_exact_on_a_constant_field(num_steps: int) -> None:
    x, velocity = torch.randn(2, 4, 5, 3, generator=_generator()).unbind(0)
    start = torch.tensor([0.0, 0.3, 0.99, 1.0])
    ends = euler_sample_from(lambda x, t: velocity, x, start, num_steps)
    torch.testing.assert_close(ends, x + (1 - start)[:, None, None] * velocity)
    assert torch.equal(ends[3], x[3])


def test_from_nought_it_is_the_plain_sampler_and_each_sample_has_steps_of_its_own() -> None:
    seen: list[torch.Tensor] = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return torch.sin(3 * x) + t[:, None, None]

    x = torch.randn(2, 5, 3, generator=_generator())
    torch.testing.assert_close(euler_sample_from(field, x, torch.zeros(2), 6), euler_sample(field, x, 6))
    seen.clear()
    euler_sample_from(field, x, torch.tensor([0.0, 0.6]), 4)
    torch.testing.assert_close(torch.stack(seen), torch.tensor([[0.0, 0.6], [0.25, 0.7], [0.5, 0.8], [0.75, 0.9]]))
    with pytest.raises(ValueError, match="num_steps"):
        euler_sample_from(field, x, torch.zeros(2), 0)
