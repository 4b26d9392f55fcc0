"""Flow matching of a real tiny policy with adapters, and how a network is run: under ZeRO, stopped, recomputed."""

import dataclasses
from pathlib import Path

import pytest
import torch

from models.lora import adapters
from models.mmdit import MMDiT
from models.policy import Policy
from models.weights import load_weights
from pipelines.training.flow_matching_objective import FlowMatchingObjective, FlowMatchingTrainee
from pipelines.training.journal import read_journal
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder
from pipelines.training.options import Execution, LoRA, TrainingOptions
from tests.feature_factory import write_features
from tests.pipelines.adapter_factory import trained_start

CPU = torch.device("cpu")
RANK = 2
OPTIONS = TrainingOptions(steps=4, batch_size=4, lr=1e-3, checkpoint_every=2, ema_decay=0.9, weight_decay=0.01)
NETWORK = "network.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flow_matching")
    trained_start(root, write_features(root / "features", {"train": 40, "val": 8}))
    return root


def _objective(folder: Path, **changes: object) -> FlowMatchingObjective:
    start, features = str(folder / "start"), str(folder / "features")
    objective = FlowMatchingObjective(start=start, features=features, size="tiny", lora=LoRA(rank=RANK, alpha=4.0))
    return dataclasses.replace(objective, **changes)  # pyright: ignore[reportArgumentType]


def _fit(objective: FlowMatchingObjective, options: TrainingOptions, out: Path, stop_at: int = 0) -> list[float]:
    """Train, or break off at a step; returns the losses that are on record."""

    def report(step: int, metrics: dict[str, float]) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    out.mkdir(parents=True, exist_ok=True)
    order = TrainingOrder(objective, options, str(out))
    if stop_at:
        with pytest.raises(KeyboardInterrupt):
            fit(order, num_workers=0, report=report)
    else:
        fit(order, num_workers=0, report=report)
    return _losses(out)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an uninterrupted training of adapters without ZeRO ended."""
    out = tmp_path_factory.mktemp("whole")
    _fit(_objective(folder), OPTIONS, out)
    return out


def _losses(out: Path) -> list[float]:
    return [float(record["loss"] or 0) for record in read_journal(out / "metrics.jsonl")]


def _check_only_low_rank_changes(folder: Path, out: Path) -> None:
    start, trained = (load_weights(place / NETWORK) for place in (folder / "start", out))
    adapted = {f"{name.removeprefix('network.')}.weight" for name in adapters(_objective(folder).build(CPU))}
    assert start.keys() == trained.keys()
    for name, before in start.items():
        if name not in adapted:
            assert torch.equal(trained[name], before) or before.isnan().all(), name
            continue
        sizes = torch.linalg.svdvals((trained[name].double() - before.double()).flatten(1))
        assert float(sizes[0]) > 1e-5, name
        # Beyond the rank there is only the rounding of the sum to float32.
        assert float(sizes[RANK:].max()) < 2e-2 * float(sizes[0]), name


def test_what_adapters_change_has_their_rank_and_all_else_stays_bit_for_bit(folder: Path, whole: Path) -> None:
    _check_only_low_rank_changes(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "bf16"), [(1, False), (2, True), (3, False), (3, True)])
def test_under_zero_and_bf16_adapters_do_the_same(
    folder: Path, whole: Path, tmp_path: Path, stage: int, bf16: bool
) -> None:
    losses = _fit(_objective(folder), dataclasses.replace(OPTIONS, zero_stage=stage, bf16=bf16), tmp_path)
    assert losses == pytest.approx(_losses(whole), rel=1e-2 if bf16 else 2e-6)
    _check_only_low_rank_changes(folder, tmp_path)


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_adapters_stopped_in_the_middle_end_like_an_uninterrupted_run(
    folder: Path, whole: Path, tmp_path: Path, stage: int
) -> None:
    options = dataclasses.replace(OPTIONS, zero_stage=stage)
    if stage:
        whole = tmp_path / "whole"
        _fit(_objective(folder), options, whole)
    assert _fit(_objective(folder), options, tmp_path / "cut", stop_at=3) == _losses(whole)[:3]
    assert _fit(_objective(folder), options, tmp_path / "cut") == _losses(whole)
    assert (tmp_path / "cut" / NETWORK).read_bytes() == (whole / NETWORK).read_bytes()
    _check_a_checkpoint_holds_adapters_alone(folder, whole)


def _check_a_checkpoint_holds_adapters_alone(folder: Path, out: Path) -> None:
    trained = sum(p.numel() for p in _objective(folder).build(CPU).parameters() if p.requires_grad)
    base = (folder / "start" / NETWORK).stat().st_size
    for checkpoint in (out / "checkpoints").glob("step_*"):
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        # Weights, under ZeRO the float32 copy it keeps of them, two moments, the average; and some kB of names.
        assert 3 * 4 * trained < size < 5 * 4 * trained + 500_000 < base


def test_adapters_lower_the_loss_on_held_out_clips(folder: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=8, lr=3e-2, ema_decay=None, validate_every=1, batch_size=8)
    _fit(_objective(folder, lora=LoRA(rank=8, alpha=8.0)), options, tmp_path)
    held_out = [float(record["val_loss"] or 0) for record in read_journal(tmp_path / "metrics.jsonl")]
    assert held_out[-1] < 0.95 * held_out[0]


def test_what_comes_out_is_a_plain_policy(whole: Path) -> None:
    assert adapters(Policy.load(whole).network) == {}


def test_the_same_seed_starts_the_same_adapters_and_another_one_others(folder: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        trainee = _objective(folder, lora_seed=seed).build(CPU)
        assert isinstance(trainee, FlowMatchingTrainee)
        return adapters(trainee.network)["text_cond_proj"].down.weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("lora", [None, LoRA(rank=RANK, alpha=4.0)])
@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_activation_checkpointing_computes_blocks_twice_and_changes_no_bit(
    folder: Path, tmp_path: Path, lora: LoRA | None, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.blocks import SingleStreamBlock

    calls: list[int] = []
    plain_forward = SingleStreamBlock.before_attention

    def counted(self: SingleStreamBlock, *arguments: object) -> object:
        calls.append(1)
        return plain_forward(self, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(SingleStreamBlock, "before_attention", counted)
    options = dataclasses.replace(OPTIONS, zero_stage=stage, steps=2)
    losses, counts = [], []
    for recompute in (False, True):
        objective = _objective(
            folder, lora=lora, execution=Execution(activation_checkpointing=recompute), val_split=None
        )
        losses.append(_fit(objective, options, tmp_path / str(recompute)))
        counts.append(len(calls))
        calls.clear()
    assert counts[1] == 2 * counts[0]
    assert losses[0] == losses[1]
    assert (tmp_path / "True" / NETWORK).read_bytes() == (tmp_path / "False" / NETWORK).read_bytes()


def test_blocks_are_compiled_only_if_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[MMDiT] = []
    monkeypatch.setattr(MMDiT, "compile_blocks", lambda network: compiled.append(network))
    _objective(folder).build(CPU)
    assert compiled == []
    trainee = _objective(folder, execution=Execution(compile=True)).build(CPU)
    assert isinstance(trainee, FlowMatchingTrainee)
    assert compiled == [trainee.network]
