"""A training whose folder is in an object store is the training of a local folder: exports, journal, resume, faults."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.data import storage_faults
from pipelines.data.local_copies import cache_folder
from pipelines.data.storage import Folder, open_folder
from pipelines.errors import EnvironmentFailed, InputError
from pipelines.training import checkpoints
from pipelines.training.adjustments import read_adjustments
from pipelines.training.journal import parse_journal
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder, TrainingResult
from pipelines.training.options import TrainingOptions
from tests.checkpoint_files import digest_files
from tests.feature_factory import write_features
from tests.storage_servers import FOR_EVER, Faults, broken_s3, s3, s3_address
from tests.toy_objective import ToyObjective
from tests.training_runs import losses_of, run_training, slow
from tests.training_worlds import train_together

__all__ = ["broken_s3", "s3", "s3_address"]
OPTIONS = TrainingOptions(steps=9, batch_size=8, lr=3e-2, ema_decay=0.9, checkpoint_every=3, validate_every=4)
EXPORT = "toy.safetensors"


@dataclasses.dataclass(frozen=True)
class Whole:
    """An undisturbed training into a local folder."""

    features: str
    out: Path
    result: TrainingResult


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    home = tmp_path_factory.mktemp("local")
    features = str(write_features(home / "features", {"train": 40, "val": 16}))
    result = run_training(ToyObjective(features=features), OPTIONS, home / "out")
    return Whole(features, home / "out", result)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cache and temporary folder of this test alone; nothing is left in them."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield
    assert not list((tmp_path / "scratch").iterdir())
    assert not list(cache_folder().glob("*"))


class _Stop(Exception):
    pass


def _train(out: str, whole: Whole, *, stop_at: int = 0) -> TrainingResult:
    def report(step: int, metrics: dict[str, float]) -> None:
        if step == stop_at:
            raise _Stop

    return fit(TrainingOrder(ToyObjective(features=whole.features), OPTIONS, out), num_workers=0, report=report)


def _cut(out: str, whole: Whole, at_step: int) -> None:
    with pytest.raises(_Stop):
        _train(out, whole, stop_at=at_step)


def _assert_same(folder: Folder, whole: Whole) -> None:
    assert folder.read_bytes(EXPORT) == (whole.out / EXPORT).read_bytes()
    assert [record["loss"] for record in parse_journal(folder.read_bytes("metrics.jsonl"))] == losses_of(whole.out)


def test_a_training_into_an_object_store_exports_the_bytes_of_one_into_a_folder(s3: str, whole: Whole) -> None:
    result = _train(f"{s3}/run/out", whole)
    folder = open_folder(f"{s3}/run/out")
    assert result == whole.result
    _assert_same(folder, whole)
    # The same checkpoints, and with each the journal up to it.
    assert folder.list_names("checkpoints") == sorted(path.name for path in (whole.out / "checkpoints").iterdir())
    newest = folder.list_names("checkpoints")[-1]
    assert len(parse_journal(folder.read_bytes(f"checkpoints/{newest}/metrics.jsonl"))) == OPTIONS.steps


@pytest.mark.parametrize("at_step", [5, slow(2), slow(9)])
def test_an_interrupted_training_goes_on_from_the_object_store_alone(s3: str, whole: Whole, at_step: int) -> None:
    _cut(f"{s3}/out", whole, at_step)
    result = _train(f"{s3}/out", whole)
    assert result == whole.result
    _assert_same(open_folder(f"{s3}/out"), whole)


def _truncate(folder: Folder, name: str) -> None:
    folder.write_bytes(name, folder.read_bytes(name)[:-10])


def _flip(folder: Folder, name: str) -> None:
    content = bytearray(folder.read_bytes(name))
    content[-5] ^= 1
    folder.write_bytes(name, bytes(content))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_truncate, r"weights_00000_of_00001.safetensors has \d+ bytes instead of \d+"),
        slow(_flip, "does not have the manifest's sha256"),
        slow(lambda folder, name: folder.delete(name), "weights_00000_of_00001.safetensors is missing"),
        slow(lambda folder, name: folder.delete(name.split("/")[0] + "/COMPLETE"), "it was never finished"),
    ],
    ids=["truncated", "altered", "missing", "half uploaded"],
)
def test_a_broken_newest_checkpoint_in_an_object_store_is_passed_over_with_its_reason(
    s3: str, whole: Whole, spoil: Callable[[Folder, str], None], reason: str
) -> None:
    out = f"{s3}/out"
    _cut(out, whole, 8)
    spoil(open_folder(f"{out}/checkpoints"), "step_00000006-1/weights_00000_of_00001.safetensors")
    found, skipped = checkpoints.newest_complete(f"{out}/checkpoints")
    assert found is not None
    assert found.step == 3
    found.release()
    assert [entry.name for entry in skipped] == ["step_00000006-1"]
    assert re.search(reason, skipped[0].reason)
    result = _train(out, whole)
    assert len(result.notes) == 1
    assert result.notes[0].startswith("checkpoint step_00000006-1 passed over: ")
    _assert_same(open_folder(out), whole)


def _is_write(target: str) -> bool:
    return "/out/" in target


@pytest.mark.parametrize("kind", ["503", slow("lost_reply"), slow("reset")])
def test_a_store_that_fails_now_and_then_costs_no_step(broken_s3: tuple[str, Faults], whole: Whole, kind: str) -> None:
    uri, faults = broken_s3
    faults.inject(kind, 9, method="PUT", matches=_is_write)
    result = _train(f"{uri}/out", whole)
    assert faults.injected == 9
    assert result == whole.result
    _assert_same(open_folder(f"{uri}/out"), whole)
    faults.inject("503", 7, matches=_is_write)
    assert _train(f"{uri}/out", whole) == whole.result
    assert faults.injected == 7


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_faults, "LONGEST_WAIT_S", 0.02)
    monkeypatch.setattr(storage_faults, "ATTEMPTS", 2)


def _weights_of(step: int) -> Callable[[str], bool]:
    return lambda target: f"step_{step:08d}-1/weights" in target


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_store_that_is_gone_at_a_checkpoint_is_a_clean_stop_that_resumes(
    broken_s3: tuple[str, Faults], whole: Whole
) -> None:
    uri, faults = broken_s3
    faults.inject("503", FOR_EVER, method="PUT", matches=_weights_of(6))
    with pytest.raises(EnvironmentFailed, match=rf"{uri}/out/checkpoints: .*step 6 cannot be written .*run the same"):
        _train(f"{uri}/out", whole)
    faults.inject("", 0)
    result = _train(f"{uri}/out", whole)
    assert result.notes == ["checkpoint step_00000006-1 passed over: no COMPLETE file: it was never finished"]
    _assert_same(open_folder(f"{uri}/out"), whole)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_store_that_refuses_a_checkpoint_is_wrong_input_and_named(
    broken_s3: tuple[str, Faults], whole: Whole
) -> None:
    uri, faults = broken_s3
    faults.inject("AccessDenied", FOR_EVER, method="PUT", matches=_weights_of(3))
    with pytest.raises(InputError, match=rf"step 3 cannot be written \(rank 0: {uri}/out/.*AccessDenied"):
        _train(f"{uri}/out", whole)


@pytest.mark.slow
def test_a_rollback_is_recorded_in_the_object_store(s3: str, whole: Whole) -> None:
    options = dataclasses.replace(OPTIONS, max_bad_steps=2, max_rollbacks=1)
    objective = ToyObjective(features=whole.features, bad_steps=(4, 5))
    # The second time these steps are bad too.
    with pytest.raises(EnvironmentFailed, match="also after 1 rollbacks"):
        fit(TrainingOrder(objective, options, f"{s3}/out"), num_workers=0, report=lambda step, metrics: None)
    (back,) = read_adjustments(f"{s3}/out/checkpoints").rollbacks
    assert (back.at_step, back.to_step) == (6, 3)


@pytest.mark.slow
def test_two_ranks_share_a_checkpoint_in_the_object_store_and_go_on_bit_for_bit(
    s3: str, whole: Whole, tmp_path: Path
) -> None:
    options = dataclasses.replace(OPTIONS, batch_size=12, zero_stage=2)
    (tmp_path / "local").mkdir()

    def order(out: str, *, cut: bool) -> TrainingOrder:
        defect_at = 7 if cut else -1
        return TrainingOrder(ToyObjective(features=whole.features, batch_size=12, defect_at=defect_at), options, out)

    local, remote = str(tmp_path / "local"), f"{s3}/out"
    orders = [order(local, cut=False), order(remote, cut=True), order(remote, cut=False)]
    train_together(orders, 2, tmp_path / "meeting")
    folder = open_folder(remote)
    content = json.loads(folder.read_bytes("checkpoints/step_00000006-1/COMPLETE"))
    assert content["world_size"] == 2
    assert {f"weights_{rank:05d}_of_00002.safetensors" for rank in range(2)} < content["files"].keys()
    assert folder.read_bytes(EXPORT) == (tmp_path / "local" / EXPORT).read_bytes()
    losses = [record["loss"] for record in parse_journal(folder.read_bytes("metrics.jsonl"))]
    assert losses == losses_of(tmp_path / "local")


def test_retention_deletes_objects(s3: str, whole: Whole) -> None:
    root = open_folder(f"{s3}/out/checkpoints")
    for step in (3, 6, 9):
        folder = open_folder(f"{root.uri}/{checkpoints.folder_name(root, step)}")
        folder.write_bytes("weights", bytes([step]))
        checkpoints.publish(folder, step=step, world_size=1, metric=None, files=digest_files(folder, ["weights"]))
    open_folder(f"{root.uri}/step_00000004-1").write_bytes("half", b"uploaded")
    checkpoints.retain(root, keep_last=1)
    assert root.list_names() == ["step_00000009-1"]
    assert root.list_infos(recursive=True).keys() == {"step_00000009-1/COMPLETE", "step_00000009-1/weights"}
