"""What a step draws for a sample: a fresh latent of the posterior, and which conditions are replaced by nulls."""

from typing import Literal

import numpy as np
import pytest
import torch

from models.spec import SPECS
from pipelines.data.contracts import FEATURES
from pipelines.data.tables import table_from_rows
from pipelines.training.flow_matching_objective import FlowMatchingObjective
from pipelines.training.objective import Batch, Draws
from tests.feature_factory import feature_row

STD = 0.5
NUM_ROWS = 400
OBJECTIVE = FlowMatchingObjective(start="", features="", size="tiny")


@pytest.fixture(scope="module")
def batches() -> dict[str, Batch]:
    """The same clip at many positions, by stream and first position."""
    row = feature_row(np.random.default_rng(0), "clip", "train")
    row["latent_std"] = np.full_like(row["latent_mean"], STD)
    table = table_from_rows([row], FEATURES, SPECS["tiny"]).take([0] * NUM_ROWS)

    def batch(stream: Literal["training", "validation"], first: int) -> Batch:
        return OBJECTIVE.collate(table, Draws(7, stream, tuple(range(first, first + NUM_ROWS))))

    return {"first": batch("training", 0), "later": batch("training", NUM_ROWS), "validation": batch("validation", 0)}


def test_the_same_clip_has_another_latent_at_every_position_with_the_posteriors_mean_and_width(
    batches: dict[str, Batch],
) -> None:
    latents = torch.cat([batches["first"]["latent"], batches["later"]["latent"]])
    assert len(torch.unique(latents[:, 0, 0])) == 2 * NUM_ROWS
    assert float(latents.std(dim=0).mean()) == pytest.approx(STD, rel=0.01)
    row = feature_row(np.random.default_rng(0), "clip", "train")
    error = latents.mean(dim=0) - torch.from_numpy(np.asarray(row["latent_mean"], np.float32))
    # The mean of 800 draws of width 0.5.
    assert float(error.square().mean().sqrt()) == pytest.approx(STD / (2 * NUM_ROWS) ** 0.5, rel=0.1)


def test_the_posteriors_draw_is_not_the_noise_of_flow_matching(batches: dict[str, Batch]) -> None:
    noise = batches["first"]["noise"][:, 0, 0]
    latent = batches["first"]["latent"][:, 0, 0]
    assert abs(float(torch.corrcoef(torch.stack([noise, latent]))[0, 1])) < 0.15


def test_a_tenth_loses_its_picture_and_independently_a_tenth_its_text(batches: dict[str, Batch]) -> None:
    video, text = (
        torch.cat([batches[name][f"drop_{kind}"] for name in ("first", "later")]) for kind in ("video", "text")
    )
    # 800 draws with p = 0.1: the mean is within three deviations of 0.0106.
    assert float(video.float().mean()) == pytest.approx(0.1, abs=0.032)
    assert float(text.float().mean()) == pytest.approx(0.1, abs=0.032)
    assert float((video & text).float().mean()) < 0.03


def test_validation_drops_nothing(batches: dict[str, Batch]) -> None:
    assert not batches["validation"]["drop_video"].any()
    assert not batches["validation"]["drop_text"].any()
