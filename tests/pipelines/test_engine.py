"""The engines by option, on a real policy, against a plain torch loop in float32: the same losses, the same weights."""

import dataclasses
from pathlib import Path

import pytest
import torch

from models.weights import load_weights
from pipelines.errors import InputError
from pipelines.training import preflight
from pipelines.training.engine import _config
from pipelines.training.flow_matching_objective import FlowMatchingObjective, FlowMatchingTrainee, fit_starting_policy
from pipelines.training.options import Execution, TrainingOptions
from pipelines.training.order import BatchPlan
from tests.feature_factory import write_features
from tests.training_runs import losses_of, plain_training, run_training, slow

OPTIONS = TrainingOptions(steps=4, batch_size=4, lr=3e-3, clip=0.5, weight_decay=0.01, checkpoint_every=100)
FLOAT32, BFLOAT16 = 1e-5, 1e-2
"""Relative tolerance of losses: sums in another order; eight bits of mantissa."""


@pytest.fixture(scope="module")
def objective(tmp_path_factory: pytest.TempPathFactory) -> FlowMatchingObjective:
    folder = tmp_path_factory.mktemp("engine")
    features = str(write_features(folder / "features", {"train": 24}))
    fit_starting_policy("tiny", 0, features, "train", folder / "start")
    return FlowMatchingObjective(start=str(folder / "start"), features=features, size="tiny", val_split=None)


@pytest.fixture(scope="module")
def plain(objective: FlowMatchingObjective) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a loop of torch alone."""
    losses, trainee, _ = plain_training(objective, OPTIONS)
    assert isinstance(trainee, FlowMatchingTrainee)
    return losses, {name: value.clone() for name, value in trainee.network.state_dict().items()}


@pytest.mark.parametrize(
    ("stage", "bf16", "accumulation", "recompute"),
    [
        (0, False, 4, True),
        (2, False, 2, True),
        (3, True, 2, True),
        slow(1, False, 2, False),
        slow(3, False, 2, True),
        slow(0, True, 1, False),
        slow(1, True, 2, True),
        slow(2, True, 1, True),
    ],
)
def test_zero_bf16_accumulation_and_recomputation_give_the_losses_of_a_plain_float32_loop(
    objective: FlowMatchingObjective,
    plain: tuple[list[float], dict[str, torch.Tensor]],
    tmp_path: Path,
    stage: int,
    bf16: bool,
    accumulation: int,
    recompute: bool,
) -> None:
    options = dataclasses.replace(OPTIONS, zero_stage=stage, bf16=bf16, accumulation=accumulation)
    chosen = dataclasses.replace(objective, execution=Execution(activation_checkpointing=recompute))
    run_training(chosen, options, tmp_path)
    losses = losses_of(tmp_path)
    expected, weights = plain
    assert losses == pytest.approx(expected, rel=BFLOAT16 if bf16 else FLOAT32)
    # The losses move by far more than the tolerance, so the steps were really taken.
    assert abs(expected[-1] - expected[0]) > 3 * BFLOAT16 * expected[0]
    exported = load_weights(tmp_path / "network.safetensors")
    moved = torch.cat([(exported[name] - weights[name]).abs().ravel() for name in weights])
    # AdamW turns rounding of a gradient near zero into a whole step of the learning rate, so the mean is what tells.
    assert float(moved.mean()) < OPTIONS.lr * (0.5 if bf16 else 0.01)


def test_a_training_leaves_nothing_behind_that_makes_other_networks_of_the_process_round_otherwise(
    objective: FlowMatchingObjective, tmp_path: Path
) -> None:
    """A worker samples and scores after it has trained, and its rows must be those of a fresh process."""
    own = torch.nn.functional.linear
    layer = torch.nn.Linear(300, 7)
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    before = layer(x)
    options = dataclasses.replace(OPTIONS, steps=1, zero_stage=3)
    run_training(objective, options, tmp_path)
    assert torch.nn.functional.linear is own
    assert torch.equal(layer(x), before)


def test_offloading_goes_to_pinned_memory_and_takes_the_weights_along_under_zero_3() -> None:
    host = {"device": "cpu", "pin_memory": True}
    for stage, expected in ((1, {"optimizer"}), (2, {"optimizer"}), (3, {"optimizer", "param"})):
        options = dataclasses.replace(OPTIONS, zero_stage=stage, offload=True)
        zero = _config(options, BatchPlan(4, 1), 1000)["zero_optimization"]
        assert {name: zero[name] for name in zero if "offload" in name} == {f"offload_{n}": host for n in expected}
    assert not [n for n in _config(OPTIONS, BatchPlan(4, 1), 1000)["zero_optimization"] if "offload" in n]


def test_what_a_machine_does_not_have_is_said_before_anything_starts() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match=r"--offload .* no GPU: leave it out"):
        preflight.check_machine(dataclasses.replace(OPTIONS, zero_stage=2, offload=True), cpu)
    preflight.check_machine(dataclasses.replace(OPTIONS, bf16=True), cpu)


@pytest.mark.gpu
def test_an_offloaded_optimizer_gives_the_losses_of_one_on_the_gpu(
    objective: FlowMatchingObjective, tmp_path: Path
) -> None:
    losses = []
    for stage, offload in ((0, False), (1, True), (2, True), (3, True)):
        out = tmp_path / f"{stage}"
        options = dataclasses.replace(OPTIONS, zero_stage=stage, offload=offload)
        run_training(objective, options, out)
        losses.append(losses_of(out))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)
