from pathlib import Path

import numpy as np
import pytest
import torch

from models.codec import build_codec
from models.spec import SPECS
from pipelines.data.tables import column_to_numpy
from pipelines.training.batches import RowGroups
from pipelines.training.objective import Draws
from pipelines.training.sf_cavp_objective import SFCAVPObjective, decode_wave
from tests.demo_factory import write_demo_features


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
