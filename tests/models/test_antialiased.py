import math

import numpy as np
import pytest
import torch
from scipy import signal

from models.antialiased import TAPS, AntiAliasedSnakeBeta, Downsample, LowPass, SnakeBeta, Upsample, kaiser_sinc_filter
from tests.models.mmdit_golden import fill_by_rule, seeded

EDGE = 6
"""Samples at either end that see repeated ones."""


def sine(cycles_a_sample: float, times: torch.Tensor) -> torch.Tensor:
    return torch.sin(2 * math.pi * cycles_a_sample * times + 0.4)[None, None]


def amplitude(x: torch.Tensor, cycles_a_sample: float) -> float:
    """Of one frequency in [1, 1, T], which must make whole turns in T."""
    times = torch.arange(x.shape[-1], dtype=x.dtype)
    turns = torch.polar(torch.ones_like(times), -2 * math.pi * cycles_a_sample * times)
    return 2 * (x[0, 0] * turns).mean().abs().item()


def test_the_filter_is_symmetric_sums_to_one_and_is_the_one_of_scipys_design() -> None:
    taps = kaiser_sinc_filter()
    assert taps.shape == (TAPS,)
    assert torch.equal(taps, taps.flip(0))
    assert taps.sum().item() == pytest.approx(1, abs=1e-6)
    beta = signal.kaiser_beta(signal.kaiser_atten(TAPS // 2, 4 * 0.3))
    assert beta == pytest.approx(4.66, abs=0.01)
    design = signal.firwin(TAPS, 0.5, window=("kaiser", beta))  # pyright: ignore[reportArgumentType]  (stub: str only)
    np.testing.assert_allclose(taps.numpy(), design, atol=1e-7)


def test_snakebeta_has_its_own_frequency_and_height_in_every_channel() -> None:
    act = SnakeBeta(3)
    fill_by_rule(act)
    x = 2 * seeded("snake", (2, 3, 50))
    y = act(x)
    for channel in range(3):
        alpha, beta = (act.get_parameter(name)[channel].item() for name in ("alpha", "beta"))
        expected = x[:, channel] + torch.sin(x[:, channel] * math.exp(alpha)) ** 2 / (math.exp(beta) + 1e-9)
        torch.testing.assert_close(y[:, channel], expected, atol=1e-6, rtol=1e-6)


def test_gradients_of_snakebeta_are_right_although_it_works_in_place() -> None:
    act = SnakeBeta(2).double()
    fill_by_rule(act)
    x = seeded("snake", (1, 2, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: act(x), (x, *act.parameters()))


def test_doubling_the_rate_of_a_slow_sine_gives_the_sine_a_quarter_sample_on_both_sides() -> None:
    times = torch.arange(64, dtype=torch.float32)
    doubled = Upsample()(sine(0.04, times))
    expected = sine(0.04, torch.arange(128) / 2 - 0.25)
    assert doubled.shape == expected.shape
    assert (doubled - expected)[..., 2 * EDGE : -2 * EDGE].abs().max() < 0.01


def test_doubling_and_halving_the_rate_leaves_a_slow_sine_as_it_is_and_in_its_place() -> None:
    x = sine(0.04, torch.arange(64, dtype=torch.float32))
    again = Downsample()(Upsample()(x))
    assert (again - x)[..., EDGE:-EDGE].abs().max() < 0.01


def test_upsampling_is_zero_stuffing_and_the_filter_with_gain_two() -> None:
    x = seeded("upsample", (1, 2, 40))
    doubled = Upsample()(x)
    for channel in range(2):
        expected = signal.upfirdn(2 * kaiser_sinc_filter().numpy(), x[0, channel].numpy(), up=2)
        # The filter is centred between its taps 5 and 6, half a new sample before a doubled one's left neighbour.
        inside = expected[5 : 5 + 80]
        np.testing.assert_allclose(
            doubled[0, channel, 2 * EDGE : -2 * EDGE].numpy(), inside[2 * EDGE : -2 * EDGE], atol=1e-6
        )


@pytest.mark.parametrize("num_samples", [1, 2, 7, 40])
def test_the_activation_of_a_constant_is_the_snakebeta_of_that_constant_up_to_the_edges(num_samples: int) -> None:
    activation = AntiAliasedSnakeBeta(4)
    fill_by_rule(activation)
    x = torch.tensor([-2.0, -0.3, 0.5, 1.7])[None, :, None].expand(2, 4, num_samples)
    torch.testing.assert_close(activation(x), activation.act(x), atol=2e-6, rtol=0)


def test_harmonics_beyond_the_band_fold_back_far_less_than_without_filters() -> None:
    # sin² doubles the frequency: 0.35 becomes 0.7 cycles a sample, which a plain snakebeta shows as 0.3.
    x = sine(0.35, torch.arange(1000, dtype=torch.float32))
    activation = AntiAliasedSnakeBeta(1)
    folded = amplitude(activation.act(x), 0.3)
    assert folded > 0.3
    assert amplitude(activation(x), 0.3) < 0.3 * folded  # twelve taps are no steep filter: 0.24


def test_channels_do_not_see_each_other() -> None:
    activation = AntiAliasedSnakeBeta(3)
    fill_by_rule(activation)
    x = seeded("channels", (1, 3, 30))
    changed = x.clone()
    changed[:, 1] += 1
    difference = (activation(changed) - activation(x)).abs().amax(dim=(0, 2))
    assert difference[0] == difference[2] == 0
    assert difference[1] > 0.1


@pytest.mark.parametrize("num_samples", [1, 5, 16, 40, 67])
def test_matrix_products_over_blocks_are_the_convolutions(num_samples: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x, doubled = (torch.randn(2, 3, length, generator=generator) for length in (num_samples, 2 * num_samples))
    up, lowpass = Upsample(), LowPass()
    torch.testing.assert_close(up.in_blocks(x, up.matrix()), up(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lowpass.in_blocks(doubled, lowpass.matrix()), lowpass(doubled), atol=1e-6, rtol=1e-5)


def test_a_few_channels_at_once_give_the_values_and_gradients_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    monkeypatch.setattr("models.antialiased.CACHED_SAMPLES", 2 * 2 * 23)  # 2 channels of 2 clips; 5 are 3 parts
    activation = AntiAliasedSnakeBeta(5)
    with torch.no_grad():
        activation.act.alpha.copy_(torch.randn(5, generator=generator))
        activation.act.beta.copy_(torch.randn(5, generator=generator))
    x = torch.randn(2, 5, 23, generator=generator, requires_grad=True)
    inputs = [x, activation.act.alpha, activation.act.beta]
    weights = torch.randn(2, 5, 23, generator=generator)
    ours, whole = activation(x), activation.downsample(activation.act(activation.upsample(x)))
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((ours * weights).sum(), inputs)
    expected = torch.autograd.grad((whole * weights).sum(), inputs)
    torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-4)
