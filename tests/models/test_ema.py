import json
from pathlib import Path

import pytest
import torch

from models.ema import (
    WeightAverage,
    exponential_decay,
    gamma_of_width,
    power_decay,
    synthesis_weights,
    synthesise,
)


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads((Path(__file__).parents[1] / "fixtures" / "mmdit" / "ema.json").read_text())


def test_gamma_agrees_with_the_original(golden: dict) -> None:
    for sigma_rel, gamma in golden["gamma(sigma_rel)"].items():
        assert gamma_of_width(float(sigma_rel)) == pytest.approx(gamma, rel=1e-10)
    with pytest.raises(ValueError, match="sigma_rel"):
        gamma_of_width(0.3)


def test_decays_agree_with_the_original(golden: dict) -> None:
    gamma = gamma_of_width(0.05)
    for step, decay in golden["beta at internal step (sigma_rel 0.05, update_every 1, corrected)"].items():
        assert power_decay(int(step), gamma) == pytest.approx(decay, rel=1e-10)


def test_synthesis_weights_agree_with_the_original(golden: dict) -> None:
    example = golden["example: solve weights"]
    weights = synthesis_weights(example["t_i"], example["gamma_i"], example["t_r"], example["gamma_r (sigma 0.08)"])
    assert weights.tolist() == pytest.approx(example["weights"], abs=1e-6)


def test_synthesis_of_a_stored_width_is_that_very_average() -> None:
    steps, gammas = [100, 100, 200, 200], [gamma_of_width(0.05), gamma_of_width(0.1)] * 2
    assert synthesis_weights(steps, gammas, 200, gammas[1]).tolist() == pytest.approx([0, 0, 0, 1], abs=1e-9)


def test_synthesis_recovers_a_width_that_was_never_stored() -> None:
    """A weight that moves on a line: the average of width sigma has a known value at every step."""
    widths, horizon = (0.05, 0.10, 0.07), 2000
    averages = {width: WeightAverage([torch.zeros(1)]) for width in widths}
    stored: list[dict[str, torch.Tensor]] = []
    steps: list[int] = []
    gammas: list[float] = []
    for step in range(1, horizon + 1):
        for width in widths:
            averages[width].update([torch.full((1,), step / horizon)], power_decay(step, gamma_of_width(width)))
        if step % 250 == 0:
            for width in widths[:2]:
                stored.append({"w": averages[width].shadows[0].clone()})
                steps.append(step)
                gammas.append(gamma_of_width(width))
    weights = synthesis_weights(steps, gammas, horizon, gamma_of_width(0.07))
    synthesised = synthesise(stored, weights)["w"]
    truth = averages[0.07].shadows[0]
    assert synthesised.item() == pytest.approx(truth.item(), abs=1e-3)
    assert abs(averages[0.05].shadows[0].item() - truth.item()) > 0.01


def test_a_plain_average_follows_its_formula_and_ramps_up() -> None:
    average = WeightAverage([torch.tensor([1.0]), torch.tensor([[2.0]])])
    average.update([torch.tensor([3.0]), torch.tensor([[2.0]])], 0.75)
    assert average.shadows[0].item() == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert average.shadows[1].item() == 2.0
    assert exponential_decay(1, 0.999) == pytest.approx(2 / 11)
    assert exponential_decay(10**6, 0.999) == 0.999


def test_an_average_of_bf16_weights_is_kept_in_float32_and_written_back_in_their_dtype() -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    average = WeightAverage([weight])
    with torch.no_grad():
        weight.fill_(1.0)
    for _ in range(100):
        average.update([weight], 0.999)
    assert average.shadows[0].item() == pytest.approx(1 - 0.999**100, rel=1e-4)  # bf16 would stand still
    average.copy_to([weight])
    assert weight.dtype == torch.bfloat16
    assert weight.item() == pytest.approx(1 - 0.999**100, rel=1e-2)


def test_an_average_goes_on_from_its_state_and_refuses_a_foreign_one() -> None:
    first = WeightAverage([torch.zeros(3)])
    first.update([torch.ones(3)], 0.5)
    second = WeightAverage([torch.zeros(3)])
    second.load_state_dict(first.state_dict())
    for average in (first, second):
        average.update([torch.ones(3)], 0.5)
    assert torch.equal(first.shadows[0], second.shadows[0])
    assert second.num_updates == 2
    with pytest.raises(ValueError, match="do not fit"):
        WeightAverage([torch.zeros(4)]).load_state_dict(first.state_dict())
