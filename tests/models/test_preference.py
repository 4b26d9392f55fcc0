import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.flow_matching import flow_matching_loss, interpolate
from models.preference import (
    CollapseMonitor,
    PairErrors,
    PreferenceLossConfig,
    dpo_flow_matching_loss,
    loser_gradient_scale,
    quartile_means,
)

errors_strategy = st.lists(st.tuples(*[st.floats(0.01, 4.0)] * 4), min_size=1, max_size=6)


def _pair(policy_winner: object, policy_loser: object, reference_winner: object, reference_loser: object) -> PairErrors:
    return PairErrors(
        policy_winner=torch.as_tensor(policy_winner, dtype=torch.float64),
        policy_loser=torch.as_tensor(policy_loser, dtype=torch.float64),
        reference_winner=torch.as_tensor(reference_winner, dtype=torch.float64),
        reference_loser=torch.as_tensor(reference_loser, dtype=torch.float64),
    )


def _gradients(errors: PairErrors, config: PreferenceLossConfig, loser_scale: Tensor | None = None) -> PairErrors:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in vars(errors).items()}
    loss, _ = dpo_flow_matching_loss(PairErrors(**leaves), config, loser_scale=loser_scale)
    loss.backward()
    return PairErrors(
        **{name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    )


def test_a_policy_equal_to_its_reference_starts_at_log_two_with_every_pair_tied() -> None:
    errors = torch.tensor([0.7, 1.3, 0.2], dtype=torch.float64)
    pair = PairErrors(
        policy_winner=errors, policy_loser=2 * errors, reference_winner=errors, reference_loser=2 * errors
    )
    loss, metrics = dpo_flow_matching_loss(pair, PreferenceLossConfig(kappa=1000, fm_weight=0.5))
    assert metrics["loss_dpo"].item() == pytest.approx(math.log(2))
    assert loss.item() == pytest.approx(math.log(2) + 0.5 * errors.mean().item())
    assert metrics["implicit_accuracy"].item() == 0.5
    assert metrics["saturation"].item() == 0.5
    assert metrics["winner_displacement"].item() == metrics["loser_displacement"].item() == 0


def test_the_loss_has_the_value_of_its_formula() -> None:
    pair = _pair([0.9, 1.1], [1.5, 1.0], [1.0, 1.0], [1.4, 1.2])
    loss, metrics = dpo_flow_matching_loss(pair, PreferenceLossConfig(kappa=5, fm_weight=2))
    margins = [5 * (0.1 - -0.1), 5 * (-0.2 - 0.1)]
    dpo = sum(math.log1p(math.exp(-m)) for m in margins) / 2
    assert loss.item() == pytest.approx(dpo + 2 * 1.0)
    assert metrics["implicit_margin"].item() == pytest.approx(sum(margins) / 2)
    assert metrics["implicit_accuracy"].item() == 0.5
    assert metrics["winner_displacement"].item() == pytest.approx(0.0)
    assert metrics["loser_displacement"].item() == pytest.approx(-0.05)
    assert metrics["saturation"].item() == pytest.approx(sum(1 / (1 + math.exp(m)) for m in margins) / 2)
    assert metrics["error_policy_winner"].item() == pytest.approx(1.0)
    assert metrics["error_reference_loser"].item() == pytest.approx(1.3)


@settings(max_examples=60, deadline=None)
@given(errors=errors_strategy, kappa=st.floats(0.1, 50))
def test_gradients_lower_the_winner_raise_the_loser_and_never_touch_the_reference(
    errors: list[tuple[float, ...]], kappa: float
) -> None:
    gradients = _gradients(_pair(*zip(*errors, strict=True)), PreferenceLossConfig(kappa=kappa, fm_weight=0))
    assert (gradients.policy_winner >= 0).all()
    assert (gradients.policy_loser <= 0).all()
    torch.testing.assert_close(gradients.policy_winner, -gradients.policy_loser)
    assert torch.count_nonzero(gradients.reference_winner) == torch.count_nonzero(gradients.reference_loser) == 0


@settings(max_examples=60, deadline=None)
@given(errors=errors_strategy)
def test_swapping_winner_and_loser_flips_the_margin(errors: list[tuple[float, ...]]) -> None:
    policy_w, policy_l, reference_w, reference_l = zip(*errors, strict=True)
    config = PreferenceLossConfig(kappa=3)
    _, metrics = dpo_flow_matching_loss(_pair(policy_w, policy_l, reference_w, reference_l), config)
    _, swapped = dpo_flow_matching_loss(_pair(policy_l, policy_w, reference_l, reference_w), config)
    assert metrics["implicit_margin"].item() == pytest.approx(-swapped["implicit_margin"].item(), abs=1e-9)
    assert metrics["implicit_accuracy"].item() == pytest.approx(1 - swapped["implicit_accuracy"].item())


def test_kappa_zero_leaves_plain_flow_matching_on_the_winner() -> None:
    gradients = _gradients(_pair([0.9, 1.1], [1.5, 1.0], [1.0, 1.0], [1.4, 1.2]), PreferenceLossConfig(kappa=0))
    assert gradients.policy_winner.tolist() == [0.5, 0.5]
    assert gradients.policy_loser.tolist() == [0.0, 0.0]


def test_dividing_by_kappa_keeps_the_first_gradient_the_same_for_every_kappa() -> None:
    pair = _pair([1.0], [1.5], [1.0], [1.5])
    for kappa in (0.5, 5.0, 500.0):
        gradients = _gradients(pair, PreferenceLossConfig(kappa=kappa, divide_by_kappa=True, fm_weight=0))
        assert gradients.policy_winner.item() == pytest.approx(0.5)


def test_label_smoothing_pulls_back_when_a_pair_is_too_sure() -> None:
    sure = _pair([0.1], [3.0], [1.0], [1.0])
    plain = _gradients(sure, PreferenceLossConfig(kappa=5, fm_weight=0))
    smoothed = _gradients(sure, PreferenceLossConfig(kappa=5, fm_weight=0, label_smoothing=0.1))
    assert plain.policy_winner.item() > 0 > smoothed.policy_winner.item()


def test_the_loser_gets_no_gradient_beyond_the_clip() -> None:
    pair = _pair([1.0, 1.0], [1.04, 1.06], [1.0, 1.0], [1.0, 1.0])
    gradients = _gradients(pair, PreferenceLossConfig(kappa=5, fm_weight=0, loser_clip=0.05))
    assert gradients.policy_loser[0] < 0
    assert gradients.policy_loser[1] == 0
    assert (gradients.policy_winner > 0).all()


def test_a_loser_scale_changes_gradients_and_no_value() -> None:
    pair = _pair([0.9, 1.1], [1.5, 1.0], [1.0, 1.0], [1.4, 1.2])
    config, scale = PreferenceLossConfig(kappa=5), torch.tensor([0.25, 1.0], dtype=torch.float64)
    plain_loss, plain_metrics = dpo_flow_matching_loss(pair, config)
    loss, metrics = dpo_flow_matching_loss(pair, config, loser_scale=scale)
    assert loss == plain_loss
    assert metrics == plain_metrics
    plain, scaled = _gradients(pair, config), _gradients(pair, config, scale)
    torch.testing.assert_close(scaled.policy_loser, scale * plain.policy_loser)
    assert torch.equal(scaled.policy_winner, plain.policy_winner)


def _velocities(seed: int) -> tuple[Tensor, ...]:
    return torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(seed)).unbind(0)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0])
def test_the_scaled_loser_gradient_never_raises_the_winner_error_to_first_order(mu: float) -> None:
    for seed in range(20):
        winner, other, *_ = _velocities(seed)
        loser = other + 2 * winner  # a loser that points the same way and is longer
        scale = loser_gradient_scale(winner, loser, mu)[:, None, None]
        assert ((scale >= 0) & (scale <= 1)).all()
        change = -(winner * (winner - scale * loser)).sum(dim=(1, 2))
        assert (change <= -mu * winner.square().sum(dim=(1, 2)) + 1e-4).all()


def test_a_loser_that_points_away_keeps_its_whole_gradient() -> None:
    winner, *_ = _velocities(0)
    assert loser_gradient_scale(winner, -winner, 0.5).tolist() == [1.0, 1.0, 1.0]
    assert loser_gradient_scale(winner, torch.zeros_like(winner), 0.5).tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(loser_gradient_scale(winner, 2 * winner, 0.5), torch.full((3,), 0.25))


def test_metrics_by_time_quartile_are_means_of_their_own_samples() -> None:
    pair = _pair([0.9, 1.1, 1.0, 0.8], [1.5, 1.0, 1.0, 1.0], [1.0] * 4, [1.4, 1.2, 1.0, 1.0])
    times = torch.tensor([0.1, 0.2, 0.5, 1.0], dtype=torch.float64)
    _, metrics = dpo_flow_matching_loss(pair, PreferenceLossConfig(kappa=1), times=times)
    by_quartile = quartile_means({name: value.item() for name, value in metrics.items()})
    assert by_quartile["winner_displacement_t0"] == pytest.approx(0.0)
    assert by_quartile["implicit_accuracy_t0"] == pytest.approx(0.5)
    assert by_quartile["implicit_accuracy_t2"] == 0.5
    assert by_quartile["winner_displacement_t3"] == pytest.approx(-0.2)
    assert not any(name.endswith("_t1") for name in by_quartile)
    assert by_quartile["implicit_margin"] == metrics["implicit_margin"].item()
    assert not any("count" in name or "_sum_" in name for name in by_quartile)


def test_quartile_sums_of_two_ranks_average_to_the_joint_means() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(5)]
    config = PreferenceLossConfig(kappa=2)

    def metrics(rows: slice) -> dict[str, float]:
        pair = _pair(*(column[rows] for column in columns[:4]))
        _, values = dpo_flow_matching_loss(pair, config, times=columns[4][rows])
        return {name: value.item() for name, value in values.items()}

    halves = metrics(slice(0, 4)), metrics(slice(4, 8))
    averaged = quartile_means({name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]})
    assert averaged == pytest.approx(quartile_means(metrics(slice(0, 8))))


def test_training_on_one_pair_prefers_it_and_leaves_the_reference_bit_identical() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    reference.load_state_dict(policy.state_dict())
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    noise, winner, loser = torch.randn(3, 8, 6, 4, generator=generator).unbind(0)
    t = torch.rand(8, generator=generator)
    optimizer = torch.optim.SGD([*policy.parameters(), *reference.parameters()], lr=0.05)

    def step() -> dict[str, Tensor]:
        at_winner, at_loser = interpolate(noise, winner, t), interpolate(noise, loser, t)
        pair = PairErrors(
            policy_winner=flow_matching_loss(policy(at_winner), noise, winner),
            policy_loser=flow_matching_loss(policy(at_loser), noise, loser),
            reference_winner=flow_matching_loss(reference(at_winner), noise, winner),
            reference_loser=flow_matching_loss(reference(at_loser), noise, loser),
        )
        loss, metrics = dpo_flow_matching_loss(pair, PreferenceLossConfig(kappa=5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return metrics

    first = step()
    for _ in range(40):
        last = step()
    assert last["loss"] < first["loss"]
    assert last["implicit_margin"] > 0.1
    assert last["implicit_accuracy"] > 0.8
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.state_dict().items())


def test_a_config_refuses_impossible_settings() -> None:
    with pytest.raises(ValueError, match="kappa"):
        PreferenceLossConfig(kappa=0, divide_by_kappa=True)
    with pytest.raises(ValueError, match="label_smoothing"):
        PreferenceLossConfig(kappa=1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="loser_clip"):
        PreferenceLossConfig(kappa=1, loser_clip=0.0)
    with pytest.raises(ValueError, match="mu"):
        loser_gradient_scale(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 1.5)


def _step_metrics(winner_rise: float, loser_ratio: float) -> dict[str, float]:
    return {
        "winner_displacement": winner_rise,
        "error_reference_winner": 1.0,
        "error_policy_loser": loser_ratio,
        "error_reference_loser": 1.0,
    }


def test_the_collapse_monitor_alarms_after_a_lasting_rise_and_not_after_a_spike() -> None:
    monitor = CollapseMonitor(horizon_steps=10)
    assert [monitor.update(_step_metrics(0.5 if step == 3 else -0.05, 1.0)) for step in range(20)] == [None] * 20
    reasons = [monitor.update(_step_metrics(0.1, 1.0)) for _ in range(40)]
    assert reasons[0] is None
    assert reasons[-1] is not None
    assert "winner" in reasons[-1]


def test_the_collapse_monitor_watches_the_loser_and_resumes_from_its_state() -> None:
    monitor, resumed = CollapseMonitor(horizon_steps=5), CollapseMonitor(horizon_steps=5)
    for _ in range(3):
        monitor.update(_step_metrics(0.0, 2.0))
    resumed.load_state_dict(monitor.state_dict())
    reasons = [[m.update(_step_metrics(0.0, 2.0)) for _ in range(3)] for m in (monitor, resumed)]
    assert reasons[0] == reasons[1]
    assert reasons[0][0] is None
    assert "loser" in str(reasons[0][-1])
