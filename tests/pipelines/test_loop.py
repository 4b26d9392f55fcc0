"""The loop in one process: the losses of a plain torch loop, exact resume, skipped steps, averages."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from models.weights import load_weights
from pipelines.errors import EnvironmentFailed, InputError
from pipelines.training.journal import read_journal
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder
from pipelines.training.options import TrainingOptions
from tests.feature_factory import write_features
from tests.toy_objective import ToyObjective
from tests.training_runs import plain_training, run_training

OPTIONS = TrainingOptions(
    steps=9,
    batch_size=8,
    lr=3e-2,
    warmup_steps=2,
    schedule="cosine",
    clip=0.05,
    weight_decay=0.1,
    checkpoint_every=3,
    validate_every=4,
)


def _losses(out: Path) -> list[tuple[int, float]]:
    records = read_journal(out / "metrics.jsonl")
    return [(int(r["step"] or 0), r["loss"]) for r in records]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_gives_the_losses_and_weights_of_a_plain_torch_loop(
    features: str, tmp_path: Path, stage: int
) -> None:
    run_training(ToyObjective(features=features), dataclasses.replace(OPTIONS, zero_stage=stage), tmp_path)
    expected, trainee, _ = plain_training(ToyObjective(features=features), OPTIONS)
    assert [loss for _, loss in _losses(tmp_path)] == pytest.approx(expected, rel=2e-6)
    exported = load_weights(tmp_path / "toy.safetensors")
    for name, value in trainee.state_dict().items():
        torch.testing.assert_close(exported[name], value, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_and_clipping_of_the_comparison_matter(features: str) -> None:
    expected, _, _ = plain_training(ToyObjective(features=features), OPTIONS)
    for change in ({"clip": 1e9}, {"lr": 2e-2}, {"weight_decay": 0.0}, {"schedule": "constant"}):
        other, _, _ = plain_training(ToyObjective(features=features), dataclasses.replace(OPTIONS, **change))
        assert other != pytest.approx(expected, rel=1e-5)


def test_validation_and_export_use_the_average_of_the_weights_and_training_does_not(
    features: str, tmp_path: Path
) -> None:
    result = run_training(ToyObjective(features=features), dataclasses.replace(OPTIONS, ema_decay=0.9), tmp_path)
    expected, _, average = plain_training(ToyObjective(features=features), OPTIONS)
    assert [loss for _, loss in _losses(tmp_path)] == pytest.approx(expected, rel=2e-6)
    exported = list(load_weights(tmp_path / "toy.safetensors").values())
    shapes = {tuple(shadow.shape): shadow for shadow in average.shadows}
    for value in exported:
        torch.testing.assert_close(value, shapes[tuple(value.shape)], rtol=1e-5, atol=1e-6)
    without = run_training(ToyObjective(features=features), OPTIONS, tmp_path / "without")
    assert result.metrics["val_loss"] != pytest.approx(without.metrics["val_loss"], rel=1e-4)


def test_two_accumulation_steps_equal_one_where_the_loss_is_a_mean(tmp_path: Path) -> None:
    # The toy's batch-wide term is no mean over samples, so the flow-matching objective is the one to ask.
    from pipelines.training.flow_matching_objective import FlowMatchingObjective, fit_starting_policy

    features = str(write_features(tmp_path / "features", {"train": 40}))
    fit_starting_policy("tiny", 0, features, "train", tmp_path / "start")
    objective = FlowMatchingObjective(start=str(tmp_path / "start"), features=features, size="tiny", val_split=None)
    losses = []
    for accumulation in (1, 2):
        options = TrainingOptions(steps=3, batch_size=4, lr=1e-2, accumulation=accumulation, checkpoint_every=100)
        out = tmp_path / f"accumulation_{accumulation}"
        out.mkdir()
        fit(TrainingOrder(objective, options, str(out)), num_workers=0, report=lambda step, metrics: None)
        losses.append([loss for _, loss in _losses(out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] != pytest.approx(losses[0][0], rel=1e-3)


class _Stop(Exception):
    pass


def _interrupted(objective: ToyObjective, options: TrainingOptions, out: Path, at_step: int) -> None:
    def report(step: int, metrics: dict[str, float]) -> None:
        if step == at_step:
            raise _Stop

    out.mkdir(parents=True, exist_ok=True)
    with pytest.raises(_Stop):
        fit(TrainingOrder(objective, options, str(out)), num_workers=0, report=report)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("at_step", [2, 5, 9])
def test_an_interrupted_run_ends_with_the_journal_and_weights_of_an_uninterrupted_one(
    features: str, tmp_path: Path, stage: int, at_step: int
) -> None:
    options = dataclasses.replace(OPTIONS, zero_stage=stage, ema_decay=0.9)
    whole = run_training(ToyObjective(features=features), options, tmp_path / "whole")
    _interrupted(ToyObjective(features=features), options, tmp_path / "cut", at_step)
    resumed = run_training(ToyObjective(features=features), options, tmp_path / "cut")
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    assert resumed.metrics == whole.metrics
    for name, value in load_weights(tmp_path / "whole" / "toy.safetensors").items():
        assert torch.equal(load_weights(tmp_path / "cut" / "toy.safetensors")[name], value)


def test_a_finished_run_called_again_exports_again_without_a_step(features: str, tmp_path: Path) -> None:
    first = run_training(ToyObjective(features=features), OPTIONS, tmp_path)
    (tmp_path / "toy.safetensors").unlink()
    steps: list[int] = []
    again = fit(
        TrainingOrder(ToyObjective(features=features), OPTIONS, str(tmp_path)),
        num_workers=0,
        report=lambda step, metrics: steps.append(step),
    )
    assert (again, steps) == (first, [])
    assert (tmp_path / "toy.safetensors").exists()
    assert [step for step, _ in _losses(tmp_path)] == list(range(1, 10))


def test_a_broken_newest_checkpoint_is_named_and_the_one_before_used(features: str, tmp_path: Path) -> None:
    _interrupted(ToyObjective(features=features), OPTIONS, tmp_path / "cut", 8)
    newest = tmp_path / "cut" / "checkpoints" / "step_00000006-1"
    weights = next(newest.glob("weights_*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    result = run_training(ToyObjective(features=features), OPTIONS, tmp_path / "cut")
    run_training(ToyObjective(features=features), OPTIONS, tmp_path / "whole")
    assert len(result.notes) == 1
    assert "step_00000006-1 passed over" in result.notes[0]
    assert "bytes instead of" in result.notes[0]
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_step_that_is_not_finite_is_skipped_and_counted_and_changes_nothing(
    features: str, tmp_path: Path, stage: int
) -> None:
    options = dataclasses.replace(OPTIONS, zero_stage=stage, steps=5, schedule="constant", warmup_steps=0)
    result = run_training(ToyObjective(features=features, bad_steps=(2,)), options, tmp_path / "bad")
    clean = run_training(ToyObjective(features=features), dataclasses.replace(options, steps=2), tmp_path / "clean")
    assert (result.skipped_steps, clean.skipped_steps) == (1, 0)
    records = read_journal(tmp_path / "bad" / "metrics.jsonl")
    assert [r["skipped"] for r in records] == [0, 0, 1, 0, 0]
    assert records[2]["loss"] is None
    assert all(math.isfinite(r["loss"] or math.nan) for i, r in enumerate(records) if i != 2)
    stopped = dataclasses.replace(options, steps=3)
    run_training(ToyObjective(features=features, bad_steps=(2,)), stopped, tmp_path / "skip_last")
    for name, value in load_weights(tmp_path / "clean" / "toy.safetensors").items():
        assert torch.equal(load_weights(tmp_path / "skip_last" / "toy.safetensors")[name], value)


def test_too_many_bad_steps_in_a_row_end_the_run_with_their_numbers(features: str, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, max_bad_steps=3, max_rollbacks=0)
    with pytest.raises(EnvironmentFailed, match=r"steps 5 to 7 .*not finite.*--lr"):
        run_training(ToyObjective(features=features, bad_steps=(4, 5, 6)), options, tmp_path)
    # Nothing is kept that a run might have to go back from at once.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003-1"]


def test_an_average_of_power_form_is_kept_too(features: str, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, ema_width=0.1)
    _interrupted(ToyObjective(features=features), options, tmp_path / "cut", 7)
    run_training(ToyObjective(features=features), options, tmp_path / "cut")
    run_training(ToyObjective(features=features), options, tmp_path / "whole")
    cut, whole = (load_weights(tmp_path / name / "toy.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    last, _, _ = plain_training(ToyObjective(features=features), options)
    assert len(last) == 9


def test_a_validation_split_smaller_than_a_batch_is_an_input_error(features: str, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, batch_size=32)
    with pytest.raises(InputError, match="no whole validation batch in 16 rows"):
        run_training(ToyObjective(features=features, batch_size=32), options, tmp_path)


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="zero-stage"):
        TrainingOptions(steps=1, batch_size=1, lr=1.0, zero_stage=4)
    with pytest.raises(InputError, match="at least 1"):
        TrainingOptions(steps=0, batch_size=1, lr=1.0)
    with pytest.raises(InputError, match="two kinds of average"):
        TrainingOptions(steps=1, batch_size=1, lr=1.0, ema_decay=0.9, ema_width=0.05)


def test_an_alarm_is_noted_once_and_stops_only_a_strict_run_also_after_a_resume(features: str, tmp_path: Path) -> None:
    lenient = ToyObjective(features=features, alarm_at=5)
    result = run_training(lenient, OPTIONS, tmp_path / "lenient")
    assert (result.steps, result.stopped) == (9, None)
    assert result.notes == ["first alarm at step 5: too long a run"]
    strict = dataclasses.replace(lenient, strict=True)
    # The alarm's memory is part of a checkpoint: killed at 4, resumed from 3, it still comes at 5.
    _interrupted(strict, OPTIONS, tmp_path / "strict", 4)
    result = run_training(strict, OPTIONS, tmp_path / "strict")
    assert (result.steps, result.stopped) == (5, "step 5: too long a run")
    assert (tmp_path / "strict" / "toy.safetensors").exists()
    assert "val_loss" in result.metrics
    assert run_training(strict, OPTIONS, tmp_path / "strict") == result


def test_a_full_disk_at_a_checkpoint_is_a_clean_stop_that_resumes(
    features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.training import checkpoints

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "publish", full)
        with pytest.raises(EnvironmentFailed, match=r"step 3 cannot be written .*No space left.*run the same command"):
            run_training(ToyObjective(features=features), OPTIONS, tmp_path / "full")
    result = run_training(ToyObjective(features=features), OPTIONS, tmp_path / "full")
    run_training(ToyObjective(features=features), OPTIONS, tmp_path / "whole")
    assert "never finished" in result.notes[0]
    assert _losses(tmp_path / "full") == _losses(tmp_path / "whole")
