"""Steps that are not finite or far out: skipped, gone back from with another order, never kept or exported."""

import dataclasses
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from models.weights import load_weights
from pipelines.errors import EnvironmentFailed, InputError
from pipelines.training.adjustments import (
    Adjustments,
    Rollback,
    order_seed,
    read_adjustments,
    write_adjustments,
)
from pipelines.training.batches import RowGroups
from pipelines.training.guards import GRAD_NORM, LOSS, MIN_HISTORY, WINDOW, SpikeGuard
from pipelines.training.journal import read_journal
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder, TrainingResult
from pipelines.training.options import TrainingOptions
from pipelines.training.order import BatchPlan, GlobalOrder
from tests.toy_objective import ToyObjective
from tests.training_runs import run_training, slow

OPTIONS = TrainingOptions(steps=12, batch_size=8, lr=1e-2, clip=0.05, checkpoint_every=3, max_bad_steps=2)
SPIKES = TrainingOptions(steps=22, batch_size=8, lr=1e-3, checkpoint_every=9, spike_factor=5.0)


class _Stop(Exception):
    pass


def _fit(objective: ToyObjective, options: TrainingOptions, out: Path, stop_at: Sequence[int] = ()) -> TrainingResult:
    """Train; for each step in `stop_at` stop once it is reported and start again."""
    for step in stop_at:

        def stop(at: int, metrics: dict[str, float], step: int = step) -> None:
            if at == step:
                raise _Stop

        with pytest.raises(_Stop):
            run_training(objective, options, out, report=stop)
    return run_training(objective, options, out)


def _records(out: Path) -> list[dict[str, float | int | None]]:
    """The journal without what is measured by the clock."""
    records = read_journal(out / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.endswith("_s") and k != "data_share"} for record in records]


def _clips_of_steps(features: str, steps: Sequence[int], number: int = 0) -> list[list[str]]:
    """The clips of the batches of some steps, in a given order of the samples."""
    groups = RowGroups(ToyObjective(features=features).training_data, ("clip_id",))
    order = GlobalOrder(groups.sizes, order_seed(0, number))
    plan = BatchPlan(OPTIONS.batch_size, 1)
    batches = []
    for step in steps:
        epochs, rows = divmod(plan.positions(step, 0).ravel(), order.num_rows)
        places = [order.epoch(int(epoch))[int(row)] for epoch, row in zip(epochs, rows, strict=True)]
        batches.append(groups.take(torch.tensor([list(map(int, p)) for p in places]).numpy())["clip_id"].to_pylist())
    return batches


def two_clips_that_meet_in_another_way(features: str) -> tuple[str, str]:
    """Clips of steps 8 and 9 that make two bad steps in a row only there, and none in the order after a rollback."""
    before, after = _clips_of_steps(features, range(8)), _clips_of_steps(features, range(6, 12), number=1)
    for first in _clips_of_steps(features, [8])[0]:
        for second in _clips_of_steps(features, [9])[0]:
            runs = [[bool({first, second} & set(batch)) for batch in batches] for batches in (before, after)]
            if not any(a and b for run in runs for a, b in pairwise(run)):
                return first, second
    raise AssertionError("no such pair of clips: choose another seed")


def test_fault_26_bad_steps_in_a_row_lead_back_to_the_last_checkpoint_and_on_in_another_order(
    features: str, tmp_path: Path
) -> None:
    poisoned = ToyObjective(features=features, poison=two_clips_that_meet_in_another_way(features))
    options = dataclasses.replace(OPTIONS, ema_decay=0.9, validate_every=4)
    result = _fit(poisoned, options, tmp_path / "whole")
    assert result is not None
    assert (result.steps, result.stopped) == (12, None)
    reason = "steps 9 to 10 all had a loss or gradient that is not finite"
    assert result.notes == [f"rolled back from step 10 to 6, order 1 of the samples from there: {reason}"]
    records = _records(tmp_path / "whole")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record.get("order") for record in records] == [None] * 6 + [1.0] * 6
    assert all(math.isfinite(v) for v in result.metrics.values())
    # The average never took a skipped step either.
    assert all(torch.isfinite(w).all() for w in load_weights(tmp_path / "whole" / "toy.safetensors").values())

    # Stopped right before the rollback, right after it and later: the same steps, the same weights.
    assert _fit(poisoned, options, tmp_path / "cut", stop_at=(9, 7, 11)) == result
    assert _records(tmp_path / "cut") == records
    one, other = ((tmp_path / name / "toy.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other


def test_steps_before_a_rollback_keep_their_order_when_a_still_earlier_checkpoint_is_used(
    features: str, tmp_path: Path
) -> None:
    poisoned = ToyObjective(features=features, poison=two_clips_that_meet_in_another_way(features))
    result = _fit(poisoned, OPTIONS, tmp_path / "whole")
    assert result is not None
    out = tmp_path / "cut"
    out.mkdir()
    seen: list[int] = []

    def stop(at: int, metrics: dict[str, float]) -> None:
        seen.append(at)
        if at == 8 and seen.count(8) == 2:
            raise _Stop

    with pytest.raises(_Stop):
        fit(TrainingOrder(poisoned, OPTIONS, str(out)), num_workers=0, report=stop)
    newest = out / "checkpoints" / "step_00000006-1"
    (newest / "training.json").write_text("{}")
    again = _fit(poisoned, OPTIONS, out)
    assert again is not None
    assert "step_00000006-1 passed over" in " ".join(again.notes)
    assert _records(out) == _records(tmp_path / "whole")
    assert (out / "toy.safetensors").read_bytes() == (tmp_path / "whole" / "toy.safetensors").read_bytes()


def test_fault_26_a_run_that_no_order_helps_stops_after_its_rollbacks_and_says_so(
    features: str, tmp_path: Path
) -> None:
    hopeless = ToyObjective(features=features, bad_steps=(7, 8))
    with pytest.raises(EnvironmentFailed, match=r"steps 8 to 9 .*not finite, also after 2 rollbacks; .*--lr"):
        _fit(hopeless, OPTIONS, tmp_path)
    assert len(read_adjustments(tmp_path / "checkpoints").rollbacks) == 2
    assert not (tmp_path / "toy.safetensors").exists()
    # The same command stops again at once; one more rollback is one more try, and a run that can goes on.
    with pytest.raises(EnvironmentFailed, match="also after 2 rollbacks"):
        _fit(hopeless, OPTIONS, tmp_path)
    result = _fit(hopeless.faultless(), OPTIONS, tmp_path)
    assert result is not None
    assert result.steps == 12
    assert [note.split(" of the samples")[0] for note in result.notes] == [
        "rolled back from step 9 to 6, order 1",
        "rolled back from step 9 to 6, order 2",
    ]


def test_bad_steps_before_the_first_checkpoint_lead_back_to_the_start(features: str, tmp_path: Path) -> None:
    hopeless = ToyObjective(features=features, bad_steps=(0, 1))
    with pytest.raises(EnvironmentFailed, match="steps 1 to 2"):
        _fit(hopeless, OPTIONS, tmp_path)
    assert {back.to_step for back in read_adjustments(tmp_path / "checkpoints").rollbacks} == {0}


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_fault_26_weights_that_are_not_finite_are_neither_kept_nor_exported(
    features: str, tmp_path: Path, ema_decay: float | None
) -> None:
    # A rate beyond float32: the first gradient is finite, and the weights after it are not.
    options = dataclasses.replace(OPTIONS, lr=1e39, steps=3, checkpoint_every=1, max_bad_steps=20, ema_decay=ema_decay)
    with pytest.raises(EnvironmentFailed, match=r"weights are not finite after step 3 and are not exported.*--lr"):
        _fit(ToyObjective(features=features), options, tmp_path)
    assert not (tmp_path / "toy.safetensors").exists()
    assert not list((tmp_path / "checkpoints").glob("*/COMPLETE"))


def test_a_skipped_step_leaves_batch_norm_as_it_was(features: str, tmp_path: Path) -> None:
    objective = ToyObjective(features=features, batch_norm=True, bad_steps=(3,))
    _fit(objective, dataclasses.replace(OPTIONS, steps=4), tmp_path / "skipped")
    for steps in (3, 4):
        _fit(objective.faultless(), dataclasses.replace(OPTIONS, steps=steps), tmp_path / f"{steps}")
    skipped, before, applied = (load_weights(tmp_path / n / "toy.safetensors") for n in ("skipped", "3", "4"))
    for name, value in before.items():
        assert torch.equal(skipped[name], value)
    assert not torch.equal(applied["net.1.running_var"], before["net.1.running_var"])


def test_a_validation_that_is_not_finite_is_never_the_best(features: str, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=6, validate_every=3)
    result = _fit(ToyObjective(features=features, bad_validation=True), options, tmp_path)
    assert result is not None
    assert "val_loss" not in result.metrics
    complete = sorted((tmp_path / "checkpoints").glob("*/COMPLETE"))
    assert [json.loads(path.read_text())["metric"] for path in complete] == [None, None]


def test_validation_has_the_same_draws_whenever_it_is_and_leaves_the_training_alone(
    features: str, tmp_path: Path
) -> None:
    journals = {}
    for every in (2, 3, 0):
        options = dataclasses.replace(OPTIONS, steps=6, validate_every=every, ema_width=0.1)
        _fit(ToyObjective(features=features), options, tmp_path / str(every))
        journals[every] = _records(tmp_path / str(every))
    assert [record["loss"] for record in journals[2]] == [record["loss"] for record in journals[0]]
    assert journals[2][5]["val_loss"] == journals[3][5]["val_loss"] == journals[0][5]["val_loss"]
    assert journals[2][1]["val_loss"] != journals[2][5]["val_loss"]


@pytest.mark.parametrize("stage", [0, slow(1), slow(2), 3])
def test_a_spike_is_skipped_and_counted_and_changes_nothing(features: str, tmp_path: Path, stage: int) -> None:
    options = dataclasses.replace(SPIKES, zero_stage=stage, steps=19)
    result = _fit(ToyObjective(features=features, big_step=18), options, tmp_path / "spike")
    assert result is not None
    assert result.skipped_steps == 1
    records = read_journal(tmp_path / "spike" / "metrics.jsonl")
    assert [record["skipped_spike"] for record in records] == [0.0] * 18 + [1.0]
    _fit(ToyObjective(features=features), dataclasses.replace(options, steps=18), tmp_path / "before")
    for name, value in load_weights(tmp_path / "before" / "toy.safetensors").items():
        assert torch.equal(load_weights(tmp_path / "spike" / "toy.safetensors")[name], value)


@pytest.mark.parametrize("stage", [0, slow(1), 2, slow(3)])
def test_a_spike_of_the_gradient_alone_is_skipped_with_its_norm(features: str, tmp_path: Path, stage: int) -> None:
    options = dataclasses.replace(SPIKES, zero_stage=stage, steps=20)
    steep = ToyObjective(features=features, big_step=18, big_gradient_alone=True)
    result = _fit(steep, options, tmp_path / "steep")
    assert result is not None
    records = read_journal(tmp_path / "steep" / "metrics.jsonl")
    norms, skipped = ([record[name] or 0 for record in records] for name in ("grad_norm", "skipped_spike"))
    assert skipped == [0.0] * 18 + [1.0, 0.0]
    assert norms[18] > 100 * max(norms[:18])
    assert norms[19] < 2 * max(norms[:18])


def test_a_guard_that_meets_no_spike_changes_no_bit_and_is_resumed_exactly(features: str, tmp_path: Path) -> None:
    objective = ToyObjective(features=features, big_step=19)
    whole = _fit(objective, SPIKES, tmp_path / "whole")
    # Its windows are part of a checkpoint: after 18 steps nothing would be a spike to a guard that began at 9.
    assert _fit(objective, SPIKES, tmp_path / "cut", stop_at=(11,)) == whole
    assert _records(tmp_path / "cut") == _records(tmp_path / "whole")
    assert [record["skipped_spike"] for record in _records(tmp_path / "cut")].count(1.0) == 1
    _fit(objective.faultless(), SPIKES, tmp_path / "on")
    _fit(objective.faultless(), dataclasses.replace(SPIKES, spike_factor=None), tmp_path / "off")
    assert (tmp_path / "on" / "toy.safetensors").read_bytes() == (tmp_path / "off" / "toy.safetensors").read_bytes()
    assert "skipped_spike" not in read_journal(tmp_path / "off" / "metrics.jsonl")[0]


def test_the_usual_value_is_a_median_that_outliers_do_not_move_and_old_steps_leave() -> None:
    guard = SpikeGuard(4.0)
    for _ in range(MIN_HISTORY - 1):
        guard.accept({LOSS: 1.0, GRAD_NORM: 2.0, "error": 9.0})
    assert not guard.is_spike(LOSS, 1e9)
    guard.accept({LOSS: 1e9, GRAD_NORM: 2.0})
    assert [guard.is_spike(LOSS, value) for value in (3.9, 4.1, math.nan)] == [False, True, False]
    assert [guard.is_spike(GRAD_NORM, value) for value in (7.9, 8.1)] == [False, True]
    for _ in range(WINDOW):
        guard.accept({LOSS: -1.0, GRAD_NORM: 20.0})
    assert not guard.is_spike(GRAD_NORM, 79.0)
    assert not guard.is_spike(LOSS, 1e9), "a median that is not positive says nothing of size"
    assert {len(window) for window in guard.recent.values()} == {WINDOW}
    resumed = SpikeGuard(4.0, json.loads(json.dumps(guard.recent)))
    assert resumed == guard


def test_a_guard_that_is_off_keeps_nothing() -> None:
    guard = SpikeGuard(None)
    guard.accept({LOSS: 1.0, GRAD_NORM: 1.0})
    assert guard.recent == {LOSS: [], GRAD_NORM: []}


def test_the_order_after_a_rollback_is_another_and_each_step_has_one() -> None:
    backs = tuple(Rollback(at_step=at, to_step=to, reason="r") for at, to in ((17, 10), (19, 10), (9, 5)))
    known = Adjustments(rollbacks=backs)
    assert [known.order_number(step) for step in (0, 4, 5, 10, 99)] == [0, 0, 3, 3, 3]
    first_two = Adjustments(rollbacks=backs[:2])
    assert first_two.segments(6, 20) == [(6, 10, 0), (10, 20, 2)]
    assert first_two.segments(10, 20) == [(10, 20, 2)]
    assert Adjustments().segments(3, 9) == [(3, 9, 0)]
    seeds = [order_seed(4, number) for number in range(4)]
    assert seeds[0] == 4
    assert len(set(seeds)) == 4


def test_what_was_decided_is_read_back_and_never_forgotten(tmp_path: Path) -> None:
    assert read_adjustments(tmp_path / "none") == Adjustments()
    known = Adjustments(rollbacks=(Rollback(at_step=9, to_step=6, reason="r"),), max_micro_size=4)
    write_adjustments(tmp_path / "new", known)
    assert read_adjustments(tmp_path / "new") == known
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["adjustments.json"]
    assert Adjustments.from_json({}) == Adjustments()
    assert known.merged(Adjustments(max_micro_size=2)) == dataclasses.replace(known, max_micro_size=2)
    assert Adjustments().merged(known) == known


def test_options_of_the_guards_that_cannot_be_are_refused() -> None:
    for change, told in (
        ({"spike_factor": 1.0}, "--spike-factor must be above 1"),
        ({"max_bad_steps": 0}, "--max-bad-steps"),
        ({"max_rollbacks": -1}, "--max-rollbacks"),
        ({"stall_timeout_s": 0.0}, "--stall-timeout-s"),
        ({"offload": True}, "--offload needs ZeRO"),
    ):
        with pytest.raises(InputError, match=told):
            dataclasses.replace(OPTIONS, **change)


def test_a_fingerprint_names_the_spike_factor_only_where_it_is_on_and_never_where_the_optimizer_lies() -> None:
    plain = OPTIONS.affecting_bytes()
    assert not {"spike_factor", "max_rollbacks", "stall_timeout_s", "offload"} & set(plain)
    assert dataclasses.replace(OPTIONS, zero_stage=3, offload=True).affecting_bytes() == plain
    assert SPIKES.affecting_bytes()["spike_factor"] == 5.0


def test_offloading_on_a_machine_without_a_gpu_is_refused_before_the_first_step(features: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to offload from")
    with pytest.raises(InputError, match=r"--offload .* no GPU: leave it out"):
        _fit(ToyObjective(features=features), dataclasses.replace(OPTIONS, zero_stage=2, offload=True), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
