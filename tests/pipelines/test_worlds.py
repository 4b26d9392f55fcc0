"""A training goes on by another number of workers and under another ZeRO stage, and ends as if nothing had happened."""

import dataclasses
import json
import shutil
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from models.weights import load_weights
from pipelines.training.flow_matching_objective import FlowMatchingObjective, fit_starting_policy
from pipelines.training.journal import read_journal
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder
from pipelines.training.options import Execution, TrainingOptions
from tests import training_worlds
from tests.feature_factory import write_features
from tests.toy_objective import ToyObjective
from tests.training_worlds import one_of_several, start_ranks, train_together

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
BATCH = 12
OPTIONS = TrainingOptions(
    steps=9,
    batch_size=BATCH,
    lr=3e-2,
    schedule="cosine",
    clip=0.05,
    weight_decay=0.1,
    ema_decay=0.9,
    checkpoint_every=3,
)


def _order(features: str, out: Path, stage: int, *, cut: bool) -> TrainingOrder:
    """A whole training, or one whose every rank meets a defect in step 8, after the checkpoint of step 6."""
    out.mkdir(parents=True, exist_ok=True)
    objective = ToyObjective(features=features, batch_size=BATCH, defect_at=7 if cut else -1)
    return TrainingOrder(objective, dataclasses.replace(OPTIONS, zero_stage=stage), str(out))


def _alone(order: TrainingOrder) -> None:
    fit(order, num_workers=0, report=lambda step, metrics: None)


def _cut_alone(order: TrainingOrder) -> None:
    with pytest.raises(KeyError):
        _alone(order)


def _written_by(out: Path, step: int) -> int:
    return json.loads((out / "checkpoints" / f"step_{step:08d}-1" / "COMPLETE").read_text())["world_size"]


def _assert_same(out: Path, whole: Path, *, exactly: bool = False) -> None:
    """Same losses to 2e-6 and weights to 2e-5, or exactly.

    Two workers that nothing interrupts already differ by 4.4e-6 from one: they add in another order, and Adam divides
    small gradients by small ones. One step of Adam is up to 3e-2, so a lost moment is a thousand times larger.
    """
    losses, expected = ([r["loss"] for r in read_journal(f / "metrics.jsonl")] for f in (out, whole))
    assert len(losses) == OPTIONS.steps
    assert losses == (expected if exactly else pytest.approx(expected, rel=2e-6))
    weights = load_weights(out / "toy.safetensors")
    for name, value in load_weights(whole / "toy.safetensors").items():
        assert torch.allclose(weights[name], value, rtol=0, atol=0 if exactly else 2e-5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features, a whole run by one, and for every stage trainings cut by one worker and by two."""
    home = tmp_path_factory.mktemp("worlds")
    features = str(write_features(home / "features", {"train": 40, "val": 24}))
    _alone(_order(features, home / "whole", 0, cut=False))
    for stage in STAGES:
        _cut_alone(_order(features, home / f"one_{stage}", stage, cut=True))
    orders = [_order(features, home / f"one_{stage}", stage, cut=False) for stage in STAGES]
    orders += [_order(features, home / f"two_{stage}", stage, cut=True) for stage in STAGES]
    for stage in (2, 3):
        orders.append(_order(features, home / f"same_{stage}", stage, cut=True))
        orders.append(_order(features, home / f"same_{stage}", stage, cut=False))
        orders.append(_order(features, home / f"same_whole_{stage}", stage, cut=False))
    train_together(orders, 2, home / "meeting")
    return home


@pytest.mark.parametrize("stage", STAGES)
def test_what_one_worker_began_two_end(home: Path, stage: int) -> None:
    assert (_written_by(home / f"one_{stage}", 6), _written_by(home / f"one_{stage}", 9)) == (1, 2)
    _assert_same(home / f"one_{stage}", home / "whole")


@pytest.mark.parametrize("stage", STAGES)
def test_what_two_workers_began_one_ends(home: Path, tmp_path: Path, stage: int) -> None:
    shutil.copytree(home / f"two_{stage}", tmp_path / "out")
    assert _written_by(tmp_path / "out", 6) == 2
    _alone(_order(str(home / "features"), tmp_path / "out", stage, cut=False))
    _assert_same(tmp_path / "out", home / "whole")


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 3), (3, 1)])
def test_a_training_goes_on_under_another_stage(home: Path, tmp_path: Path, before: int, after: int) -> None:
    shutil.copytree(home / f"two_{before}", tmp_path / "out")
    _alone(_order(str(home / "features"), tmp_path / "out", after, cut=False))
    _assert_same(tmp_path / "out", home / "whole")


@pytest.mark.parametrize("stage", [2, 3])
def test_the_same_two_workers_go_on_bit_for_bit(home: Path, stage: int) -> None:
    _assert_same(home / f"same_{stage}", home / f"same_whole_{stage}", exactly=True)


def test_what_two_workers_began_three_end(home: Path, tmp_path: Path) -> None:
    orders = []
    for stage in (2, 3):
        shutil.copytree(home / f"two_{stage}", tmp_path / str(stage))
        orders.append(_order(str(home / "features"), tmp_path / str(stage), stage, cut=False))
    train_together(orders, 3, tmp_path / "meeting")
    for stage in (2, 3):
        assert _written_by(tmp_path / str(stage), 9) == 3
        _assert_same(tmp_path / str(stage), home / "whole")


def test_three_workers_that_average_within_backward_go_on_bit_for_bit(home: Path, tmp_path: Path) -> None:
    # Three summands are rounded by the order in which they are added: DDP must not lay out its buckets anew meanwhile.
    features = str(home / "features")
    orders = [_order(features, tmp_path / "cut", 0, cut=True), _order(features, tmp_path / "cut", 0, cut=False)]
    orders.append(_order(features, tmp_path / "whole", 0, cut=False))
    train_together(orders, 3, tmp_path / "meeting")
    _assert_same(tmp_path / "cut", tmp_path / "whole", exactly=True)
    records = read_journal(tmp_path / "whole" / "metrics.jsonl")
    assert "communication_s" not in records[0]
    for before, record in pairwise(records):
        waited_s, backward_s = record["communication_s"], before["backward_s"]
        assert waited_s is not None
        assert backward_s is not None
        # It is of the step before, whose backward pass it was a part of.
        assert 0 <= waited_s < backward_s


def test_two_workers_with_other_engines_of_an_mmdit_lose_what_plain_ones_lose(tmp_path: Path) -> None:
    features = str(write_features(tmp_path / "features", {"train": 40, "val": 8}))
    fit_starting_policy("tiny", 0, features, "train", tmp_path / "start")
    plain = TrainingOptions(steps=4, batch_size=8, lr=1e-3, accumulation=2)
    engines = {
        "plain": (plain, Execution()),
        "recomputed": (plain, Execution(activation_checkpointing=True)),
        "at_once": (dataclasses.replace(plain, accumulation=1), Execution()),
        "bf16": (dataclasses.replace(plain, bf16=True), Execution()),
    }
    orders = []
    for name, (options, execution) in engines.items():
        (tmp_path / name).mkdir()
        objective = FlowMatchingObjective(
            start=str(tmp_path / "start"), features=features, size="tiny", val_split=None, execution=execution
        )
        orders.append(TrainingOrder(objective, options, str(tmp_path / name)))
    train_together(orders, 2, tmp_path / "meeting")
    losses = {name: [r["loss"] for r in read_journal(tmp_path / name / "metrics.jsonl")] for name in engines}
    assert len(losses["plain"]) == 4
    assert losses["recomputed"] == losses["plain"]
    assert losses["at_once"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=2e-3)
    assert losses["bf16"] != losses["plain"]


def _hang(rank: int, meeting: str) -> None:
    """The last rank never comes so far that it watches itself; the others wait for it."""
    if rank == 2:
        time.sleep(10**6)
    with one_of_several(rank, 3, meeting):
        pass


def test_ranks_that_hang_are_ended_and_show_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_worlds, "PATIENCE_S", 45.0)
    monkeypatch.setattr(training_worlds, "START_AND_END_S", 0.0)
    with pytest.raises(TimeoutError, match=r"processes \[\d+, \d+, \d+\] did not end within 45 s"):
        start_ranks(_hang, (str(tmp_path / "meeting"),), 3)
    shown = capfd.readouterr().err
    assert shown.count("in _hang") == 2
    assert "in one_of_several" in shown
