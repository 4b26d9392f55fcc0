"""Preference training of a real tiny policy: shared draws, a frozen reference, the control, guards, metrics."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.lora import adapters, merged_state_dict
from models.mmdit import MMDiT
from models.preference import PreferenceLossConfig
from models.weights import load_weights
from pipelines.tracking import SilentTracker
from pipelines.training.batches import RowGroups
from pipelines.training.journal import read_journal
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder
from pipelines.training.objective import Batch, Draws
from pipelines.training.options import Execution, LoRA, TrainingOptions
from pipelines.training.preference_objective import PreferenceObjective, PreferenceTrainee, WinnerTrainee
from pipelines.training.stages import Launching, train_rpo
from tests.feature_factory import write_features, write_pairs
from tests.pipelines.adapter_factory import trained_start
from tests.world_factory import write_policy

CPU = torch.device("cpu")
LOSS = PreferenceLossConfig(kappa=5.0, divide_by_kappa=True)
LORA = LoRA(rank=4, alpha=4.0)


def alone(tensor: Tensor) -> Tensor:
    return tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preference")
    trained_start(root, write_features(root / "features", {"train": 40}))
    write_pairs(root / "pairs", num_kept=20, num_dropped=4)
    return root


def _objective(folder: Path, **changes: object) -> PreferenceObjective:
    objective = PreferenceObjective(start=str(folder / "start"), pairs=str(folder / "pairs"), size="tiny", loss=LOSS)
    return dataclasses.replace(objective, **changes)  # pyright: ignore[reportArgumentType]


def _batch(objective: PreferenceObjective, count: int = 6) -> Batch:
    groups = RowGroups(objective.training_data, objective.columns)
    places = np.stack([np.zeros(count, np.int64), np.arange(count)], axis=1)
    return objective.collate(groups.take(places), Draws(0, "training", tuple(range(count))))


def test_policy_equal_to_reference_gives_ln_2_and_ties(folder: Path) -> None:
    objective = _objective(folder)
    trainee = objective.build(CPU)
    _, metrics = trainee(_batch(objective), alone)
    assert float(metrics["loss_dpo"]) == pytest.approx(math.log(2) / LOSS.kappa, rel=1e-6)
    assert float(metrics["implicit_accuracy"]) == 0.5
    assert float(metrics["winner_displacement"]) == 0
    assert float(metrics["saturation"]) == 0.5


def test_the_reference_gets_no_gradient_and_stays_bit_identical(folder: Path) -> None:
    objective = _objective(folder)
    trainee = objective.build(CPU)
    assert isinstance(trainee, PreferenceTrainee)
    assert trainee.reference is not None
    before = {name: value.clone() for name, value in trainee.reference.network.state_dict().items()}
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-3)
    for _ in range(2):
        loss, _ = trainee(_batch(objective), alone)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = trainee.reference.network.state_dict()
    assert all(torch.equal(before[name], after[name]) or before[name].isnan().all() for name in before)
    assert all(parameter.grad is None for parameter in trainee.reference.network.parameters())
    changed = trainee.network.state_dict()
    assert any(not torch.equal(before[name], changed[name]) for name in before)


def test_winner_and_loser_share_noise_time_and_dropped_conditions(folder: Path) -> None:
    objective = _objective(folder)
    trainee = objective.build(CPU)
    batch = _batch(objective)
    twins = {**batch, "loser": batch["winner"]}
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter.mul_(1.1)
    _, metrics = trainee(twins, alone)
    # Identical sounds can only have identical errors if everything drawn is shared.
    assert float(metrics["error_policy_winner"]) == pytest.approx(float(metrics["error_policy_loser"]), rel=1e-5)
    assert float(metrics["error_reference_winner"]) == pytest.approx(float(metrics["error_reference_loser"]), rel=1e-5)


def test_swapping_winner_and_loser_flips_the_margin(folder: Path) -> None:
    objective = _objective(folder)
    trainee = objective.build(CPU)
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter.mul_(1.1)
    batch = _batch(objective)
    swapped = {**batch, "winner": batch["loser"], "loser": batch["winner"]}
    margin, flipped = (float(trainee(b, alone)[1]["implicit_margin"]) for b in (batch, swapped))
    assert margin == pytest.approx(-flipped, rel=1e-4)
    assert abs(margin) > 1e-4


def test_the_control_sees_the_same_winners_and_noise_and_has_no_reference(folder: Path) -> None:
    dpo, control = _objective(folder), _objective(folder, kind="winner_fm")
    batch, control_batch = _batch(dpo), _batch(control)
    assert all(torch.equal(batch[name], control_batch[name]) for name in control_batch)
    assert set(batch) - set(control_batch) == {"loser"}
    trainee = control.build(CPU)
    assert isinstance(trainee, WinnerTrainee)
    loss, _ = trainee(control_batch, alone)
    _, metrics = dpo.build(CPU)(batch, alone)
    assert float(loss.detach()) == pytest.approx(float(metrics["loss_fm_winner"]), rel=1e-5)


def test_kappa_zero_is_the_control(folder: Path) -> None:
    kappa_zero = _objective(folder, loss=PreferenceLossConfig(kappa=0.0))
    batch = _batch(kappa_zero)
    gradients = []
    for objective in (kappa_zero, _objective(folder, kind="winner_fm")):
        trainee = objective.build(CPU)
        trainee(batch, alone)[0].backward()
        gradients.append({name: p.grad for name, p in trainee.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


def test_the_probe_measures_both_gradient_parts_and_leaves_no_gradient(folder: Path) -> None:
    objective = _objective(folder)
    trainee = objective.build(CPU)
    batch = _batch(objective)
    probe = trainee.probe(batch, alone)
    assert all(parameter.grad is None for parameter in trainee.parameters())
    trainee(batch, alone)[0].backward()
    total = torch.nn.utils.get_total_norm([p.grad for p in trainee.parameters() if p.grad is not None])
    dpo, anchor, cosine = probe["grad_norm_dpo"], probe["grad_norm_fm"], probe["grad_cosine"]
    # |a + b|^2 = |a|^2 + |b|^2 + 2 |a| |b| cos
    assert float(total) == pytest.approx(math.sqrt(dpo**2 + anchor**2 + 2 * dpo * anchor * cosine), rel=1e-3)
    assert dpo > 0
    assert anchor > 0


def _move_adapters(trainee: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for adapter in adapters(trainee).values():
            adapter.up.weight.copy_(0.2 * torch.randn(adapter.up.weight.shape, generator=generator))


def test_with_adapters_the_reference_is_the_same_network_without_them(folder: Path) -> None:
    objective = _objective(folder, lora=LORA)
    trainee, batch = objective.build(CPU), _batch(objective)
    assert isinstance(trainee, PreferenceTrainee)
    assert trainee.reference is None
    _, metrics = trainee(batch, alone)
    assert float(metrics["loss_dpo"]) == pytest.approx(math.log(2) / LOSS.kappa, rel=1e-6)
    assert float(metrics["winner_displacement"]) == 0
    _move_adapters(trainee)
    # The loss of a merged policy against a loaded copy of its start is the same, term by term.
    full = _objective(folder).build(CPU)
    assert isinstance(full, PreferenceTrainee)
    full.network.load_state_dict(merged_state_dict(trainee.network))
    wanted, got = full(batch, alone)[1], trainee(batch, alone)[1]
    assert wanted.keys() == got.keys()
    assert abs(float(wanted["implicit_margin"])) > 1e-3
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["dpo", "winner_fm"])
def test_with_adapters_only_they_are_trained_and_all_of_them(folder: Path, kind: str) -> None:
    objective = _objective(folder, lora=LORA, kind=kind)
    trainee = objective.build(CPU)
    _move_adapters(trainee)
    trainee(_batch(objective), alone)[0].backward()
    with_gradient = {name for name, p in trainee.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert with_gradient == {name for name, _ in trainee.named_parameters() if ".adapter." in name}


def test_the_reference_is_recomputed_and_compiled_like_the_policy_and_adapters_need_no_second_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[MMDiT] = []
    monkeypatch.setattr(MMDiT, "compile_blocks", lambda network: compiled.append(network))
    execution = Execution(activation_checkpointing=True, compile=True)
    for lora, copies in ((None, 2), (LORA, 1)):
        compiled.clear()
        trainee = _objective(folder, lora=lora, execution=execution).build(CPU)
        assert isinstance(trainee, PreferenceTrainee)
        assert trainee.network.checkpoint_activations
        assert len(compiled) == copies


def test_activation_checkpointing_under_preferences_changes_no_bit_of_loss_or_gradient(folder: Path) -> None:
    losses, gradients = [], []
    for recompute in (False, True):
        objective = _objective(folder, lora=LORA, execution=Execution(activation_checkpointing=recompute))
        trainee = objective.build(CPU).train()
        _move_adapters(trainee)
        loss, _ = trainee(_batch(objective), alone)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([p.grad for p in trainee.parameters() if p.grad is not None])
    assert losses[0] == losses[1]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA])
def test_under_zero_3_preferences_are_the_same_and_only_the_probe_is_left_out(
    folder: Path, tmp_path: Path, lora: LoRA | None
) -> None:
    objective = _objective(folder, lora=lora, probe_steps=2, execution=Execution(activation_checkpointing=True))
    records, notes = {}, {}
    for stage in (0, 3):
        out = tmp_path / str(stage)
        out.mkdir()
        options = TrainingOptions(steps=3, batch_size=4, lr=1e-3, zero_stage=stage)
        order = TrainingOrder(objective, options, str(out))
        notes[stage] = fit(order, num_workers=0, report=lambda step, metrics: None).notes
        records[stage] = read_journal(out / "metrics.jsonl")
    assert (notes[0], notes[3]) == ([], ["gradients are not probed under ZeRO-3"])
    assert ["grad_cosine" in record for record in records[0]] == [False, True, False]
    assert not any("grad_cosine" in record for record in records[3])
    for name in ("loss", "implicit_margin", "grad_norm"):
        wanted, got = ([float(record[name] or 0) for record in records[stage]] for stage in (0, 3))
        # A margin is the difference of two errors near 1: one rounding of float32 in each is 2.4e-7, over a batch of 4.
        assert got == pytest.approx(wanted, rel=1e-3, abs=4e-6), name


def test_an_alarm_of_collapse_is_reported_or_stops(folder: Path) -> None:
    objective = _objective(folder, strict_guards=True)
    trainee = objective.build(CPU)
    rising = {
        "winner_displacement": 0.5,
        "error_reference_winner": 1.0,
        "error_policy_loser": 1.0,
        "error_reference_loser": 1.0,
    }
    alarms = [trainee.alarm(rising) for _ in range(60)]
    assert alarms[0] is None
    assert "winner error +50.0%" in str(alarms[-1])
    restored = objective.build(CPU)
    restored.load_watch_state(trainee.watch_state())
    assert restored.alarm(rising) is not None
    assert (objective.stop_on_alarm, _objective(folder).stop_on_alarm) == (True, False)


def test_train_rpo_as_a_stage_learns_writes_every_metric_and_skips_when_done(folder: Path, tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy", folder / "features")
    options = TrainingOptions(steps=12, batch_size=8, lr=1e-3, checkpoint_every=6)
    lines: list[str] = []
    launching = Launching(num_workers=0, track=lambda context: SilentTracker(), say=lines.append)

    def run(out: str, kind: str) -> str:
        return train_rpo(
            policy=str(policy),
            pairs=str(folder / "pairs"),
            out=str(tmp_path / out),
            options=options,
            loss=LOSS,
            launching=launching,
            kind=kind,  # pyright: ignore[reportArgumentType]
            probe_every=2,
        )

    assert [run("dpo", "dpo"), run("dpo", "dpo"), run("control", "winner_fm")] == ["run", "skip", "run"]
    records = read_journal(tmp_path / "dpo" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    expected = {"loss_dpo", "loss_fm_winner", "implicit_accuracy", "implicit_margin", "winner_displacement"}
    expected |= {"loser_displacement", "saturation", "error_reference_winner", "grad_norm", "alarm", "learning_rate"}
    assert expected <= records[0].keys()
    assert any(name.startswith("implicit_accuracy_t") for name in records[0])
    assert {"grad_norm_dpo", "grad_norm_fm", "grad_cosine"} <= records[1].keys()
    assert "grad_cosine" not in records[0]
    assert records[0]["implicit_accuracy"] == 0.5
    losses = [float(record["loss"] or 0) for record in records]
    assert sum(losses[-4:]) < sum(losses[:4])
    start, trained = (load_weights(place / "network.safetensors") for place in (policy, tmp_path / "dpo"))
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    # The latent transform is inherited unchanged.
    assert (policy / "transform.safetensors").read_bytes() == (tmp_path / "dpo" / "transform.safetensors").read_bytes()
    assert sorted(path.name for path in (tmp_path / "dpo").iterdir()) == [
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "network.safetensors",
        "stage.json",
        "transform.safetensors",
    ]
