from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from models.codec import build_codec
from models.spec import SPECS
from pipelines.data.tables import column_to_numpy
from pipelines.training.batches import RowGroups
from pipelines.training.objective import Draws
from pipelines.training.sf_cavp_objective import SFCAVPObjective, decode_wave
from tests.demo_factory import write_demo_features
from tests.world_factory import write_degraded, write_policy


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_features(tmp_path_factory.mktemp("sf_cavp") / "features", {"train": 8, "val": 2})


def objective(features: Path, share: float) -> SFCAVPObjective:
    rate_hz = SPECS["tiny"].sample_rate_hz
    return SFCAVPObjective(start="", features=str(features), size="tiny", sample_rate_hz=rate_hz, codec_share=share)


def batch_of(features: Path, share: float, count: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Waves of the batch, the recorded ones, and the ones through the codec."""
    wanted = objective(features, share)
    groups = RowGroups(wanted.training_data, ("frames", "audio", "latent_mean"))
    rows = groups.take(np.array([(0, index) for index in range(count)]))
    batch = wanted.collate(rows, Draws(3, "training", tuple(range(count))))
    recorded = torch.stack([decode_wave(flac, 16_000) for flac in rows["audio"].to_pylist()])
    codec = build_codec("tiny")
    latents = torch.tensor(column_to_numpy(rows["latent_mean"]))
    decoded = torch.cat([codec.decode(latents[i : i + 1]) for i in range(count)])
    return batch["waves"], recorded, decoded


def test_without_a_share_every_sound_is_the_recorded_one_and_no_latents_are_read(features: Path) -> None:
    waves, recorded, _ = batch_of(features, 0.0)
    assert torch.equal(waves, recorded)
    assert objective(features, 0.0).columns == ("frames", "audio")
    assert objective(features, 0.5).columns == ("frames", "audio", "latent_mean")


def test_a_share_of_the_sounds_comes_out_of_the_codec_and_the_rest_is_untouched(features: Path) -> None:
    waves, recorded, decoded = batch_of(features, 0.5)
    through = [bool(torch.equal(w, d)) for w, d in zip(waves, decoded, strict=True)]
    plain = [bool(torch.equal(w, r)) for w, r in zip(waves, recorded, strict=True)]
    assert [not p for p in plain] == through
    assert 0 < sum(through) < len(through)


def test_which_sounds_go_through_the_codec_does_not_depend_on_the_batch(features: Path) -> None:
    assert torch.equal(batch_of(features, 0.5, count=3)[0], batch_of(features, 0.5)[0][:3])


@pytest.fixture(scope="module")
def degraded(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("degraded")
    return write_degraded(root / "degraded", features, write_policy(root / "policy", features))


def mixed(wanted: SFCAVPObjective, positions: np.ndarray) -> tuple[pa.Table, dict[str, torch.Tensor]]:
    """The rows at some positions of a training, and their batch."""
    groups = RowGroups(wanted.training_data, (*wanted.columns, "clip_id"))
    rows = groups.take(groups.order(5).finder()(positions))
    return rows, wanted.collate(rows, Draws(5, "training", tuple(int(position) for position in positions)))


def test_one_sample_in_so_many_is_degraded_and_none_of_those_goes_through_the_codec_again(
    features: Path, degraded: Path
) -> None:
    wanted = replace(objective(features, 1.0), degraded=str(degraded), degraded_every=4)
    rows, batch = mixed(wanted, np.arange(16))
    is_degraded = batch["is_degraded"].tolist()
    assert np.array(is_degraded).reshape(4, 4).sum(axis=1).tolist() == [1] * 4
    assert is_degraded == [versions is not None for versions in rows["worse"].to_pylist()]
    recorded = torch.stack([decode_wave(flac, 16_000) for flac in rows["audio"].to_pylist()])
    for wave, as_stored, is_worse in zip(batch["waves"], recorded, is_degraded, strict=True):
        assert torch.equal(wave, as_stored) == is_worse
    stored = [versions for versions in rows["worse"].to_pylist() if versions is not None]
    by_hand = torch.stack([torch.stack([decode_wave(flac, 16_000) for flac in versions]) for versions in stored])
    assert by_hand.shape == (4, 3, 40_000)
    assert torch.equal(batch["degraded"], by_hand)


def test_a_batch_that_happens_to_have_no_degraded_row_has_none_of_their_sounds(features: Path, degraded: Path) -> None:
    wanted = replace(objective(features, 0.0), degraded=str(degraded), degraded_every=4)
    is_degraded = mixed(wanted, np.arange(16))[1]["is_degraded"]
    plain = (~is_degraded).nonzero().flatten().numpy()[:4]
    rows, batch = mixed(wanted, plain)
    assert "worse" not in rows.column_names
    assert batch["degraded"].shape == (0, 3, 40_000)
    assert batch["is_degraded"].tolist() == [False] * 4
    only = mixed(wanted, is_degraded.nonzero().flatten().numpy()[:2])[1]
    assert only["degraded"].shape == (2, 3, 40_000)


def test_validation_has_no_degraded_sounds_and_the_draws_are_those_without(features: Path, degraded: Path) -> None:
    plain = objective(features, 0.5)
    wanted = replace(plain, degraded=str(degraded))
    batches = []
    for one in (plain, wanted):
        rows = RowGroups(one.validation_data, one.columns).take(np.array([(0, 0), (0, 1)]))
        batches.append(one.collate(rows, Draws(5, "validation", (0, 1))))
    without, with_them = batches
    assert set(with_them) - set(without) == {"degraded", "is_degraded"}
    assert with_them["degraded"].shape == (0, 3, 40_000)
    for name, tensor in without.items():
        assert torch.equal(tensor, with_them[name]), name
