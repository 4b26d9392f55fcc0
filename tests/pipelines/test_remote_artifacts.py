"""The stages on artifacts in an object store: trainings that start from one, and what reads a finished policy."""

from pathlib import Path

import pytest
import torch

from models.preference import PreferenceLossConfig
from pipelines.data.local_copies import cache_folder
from pipelines.data.storage import open_folder
from pipelines.data.units import HERE
from pipelines.errors import ContractError, InputError, StageConflict
from pipelines.evaluation.evaluate import EvaluationInputs, evaluate, read_scores
from pipelines.evaluation.subjects import EvaluationSettings
from pipelines.generation_steps import find_networks
from pipelines.preferences.candidates import Sampling
from pipelines.tracking import SilentTracker
from pipelines.training.options import TrainingOptions
from pipelines.training.stages import Launching, train_mmdit, train_rpo, train_sf_cavp
from tests.feature_factory import write_pairs
from tests.storage_servers import s3, s3_address
from tests.world_factory import write_world

__all__ = ["s3", "s3_address"]
LAUNCHING = Launching(num_workers=0, track=lambda context: SilentTracker(), say=lambda line: None)
FEW = TrainingOptions(steps=2, batch_size=4, lr=1e-3, checkpoint_every=1)
LOSS = PreferenceLossConfig(kappa=5.0, divide_by_kappa=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _line(place: str, world: str, pairs: str) -> None:
    """A reward, a policy, and one trained on from it, each into a folder of `place`."""
    train_sf_cavp(features=world, out=f"{place}/reward", size="tiny", options=FEW, launching=LAUNCHING)
    train_mmdit(features=world, out=f"{place}/m0", size="tiny", options=FEW, launching=LAUNCHING)
    train_rpo(policy=f"{place}/m0", pairs=pairs, out=f"{place}/m1", options=FEW, loss=LOSS, launching=LAUNCHING)


def _scores(place: str, world: str, out: Path) -> list[float]:
    evaluate(
        EvaluationInputs(features=world, reward=f"{place}/reward", policy=f"{place}/m1"),
        EvaluationSettings(
            subject="policy",
            split="val",
            seed=0,
            num_candidates=1,
            max_clips=None,
            sampling=Sampling(num_steps=2, guidance=1.0),
        ),
        out=str(out),
        pool=HERE,
        track=lambda context: SilentTracker(),
        say=lambda line: None,
    )
    return read_scores(str(out))[0].values["reward"].tolist()


@pytest.mark.slow
def test_every_training_and_an_evaluation_give_the_same_in_an_object_store_as_in_a_folder(
    s3: str, tmp_path: Path
) -> None:
    world = str(write_world(tmp_path / "world", {"train": 8, "val": 6}))
    pairs = str(write_pairs(tmp_path / "pairs", 8, 1))
    for place in (str(tmp_path / "local"), f"{s3}/runs"):
        _line(place, world, pairs)
    for name in ("reward", "m0", "m1"):
        local, remote = open_folder(tmp_path / "local" / name), open_folder(f"{s3}/runs/{name}")
        assert local.list_names() == remote.list_names()
        for file in local.list_names():
            if file.endswith((".safetensors", "manifest.json")):
                assert remote.read_bytes(file) == local.read_bytes(file), (name, file)
    assert _scores(f"{s3}/runs", world, tmp_path / "remote_scores") == _scores(
        str(tmp_path / "local"), world, tmp_path / "local_scores"
    )
    # As ever, a folder that was made with other settings refuses, and one that is finished is left alone.
    other = TrainingOptions(steps=2, batch_size=4, lr=2e-3)
    with pytest.raises(StageConflict, match=rf"{s3}/runs/m0 was made with other settings \(lr: 0.001 there, 0.002"):
        train_mmdit(features=world, out=f"{s3}/runs/m0", size="tiny", options=other, launching=LAUNCHING)
    again = train_mmdit(features=world, out=f"{s3}/runs/m0", size="tiny", options=FEW, launching=LAUNCHING)
    assert again == "skip"
    # What generate and its like open.
    found = find_networks(f"{s3}/runs/m1", f"{s3}/runs/reward", None, torch.device("cpu"))
    assert found.policy.parent == cache_folder()
    network = open_folder(f"{s3}/runs/m1").read_bytes("network.safetensors")
    assert (found.policy / "network.safetensors").read_bytes() == network
    open_folder(f"{s3}/runs/m1").write_bytes("network.safetensors", network[:-1])
    # A copy that was verified when it was made stands for what the manifest says.
    assert find_networks(f"{s3}/runs/m1", None, None, torch.device("cpu")).policy == found.policy
    (found.policy / "network.safetensors").write_bytes(network[:-2] + b"xx")
    with pytest.raises(ContractError, match=rf"{s3}/runs/m1/network.safetensors has \d+ bytes instead of"):
        find_networks(f"{s3}/runs/m1", None, None, torch.device("cpu"))
    with pytest.raises(InputError, match=rf"{s3}/runs/m9 does not exist"):
        find_networks(f"{s3}/runs/m9", None, None, torch.device("cpu"))
