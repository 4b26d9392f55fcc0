"""What a step draws for a sample: a fresh latent of the posterior, and which conditions are replaced by nulls.

A row without video is a row whose video is dropped: the same loss, whatever stands in its columns.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from models.policy import Policy
from models.spec import SPECS
from pipelines.data.contracts import FEATURES
from pipelines.data.tables import table_from_rows
from pipelines.training.flow_matching_objective import FlowMatchingObjective, fit_starting_policy
from pipelines.training.objective import Batch, Draws
from tests.feature_factory import feature_row, without_video, write_dataset
from tests.pipelines.adapter_factory import trained_start

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


@pytest.fixture(scope="module")
def half_seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of 40 rows of which every other has no video, and a start that was fitted on them, in one folder."""
    root = tmp_path_factory.mktemp("half_seen")
    rows = [
        feature_row(np.random.default_rng(index), f"clip_{index:03d}", "train", has_video=index % 2 == 0)
        for index in range(40)
    ]
    write_dataset(root / "features", FEATURES, {"train": table_from_rows(rows, FEATURES, SPECS["tiny"])}, {"half": 40})
    trained_start(root, root / "features")
    return root


@pytest.mark.parametrize("stream", ["training", "validation"])
def test_the_loss_of_a_row_without_video_is_that_of_the_row_with_its_video_dropped(
    half_seen: Path, stream: Literal["training", "validation"]
) -> None:
    seen = [feature_row(np.random.default_rng(index), f"clip_{index}", "train") for index in range(4)]
    unseen = [row | without_video(row) for row in seen]
    loud = {name: np.full_like(seen[0][name], 3e4) for name in ("clip_features", "sync_features")}
    objective = FlowMatchingObjective(start=str(half_seen / "start"), features="", size="tiny")
    trainee = objective.build(torch.device("cpu"))
    draws = Draws(3, stream, (5, 6, 7, 8))

    def loss(rows: list[dict[str, object]], **changes: torch.Tensor) -> float:
        batch = objective.collate(table_from_rows(rows, FEATURES, SPECS["tiny"]), draws) | changes
        with torch.no_grad():
            return float(trainee(batch, lambda tensor: tensor)[0])

    dropped = loss(seen, drop_video=torch.ones(4, dtype=torch.bool))
    assert loss(unseen) == dropped
    assert loss([row | loud for row in unseen]) == dropped
    assert loss(seen) != dropped
    # Words are dropped as ever: by their own draw.
    table = table_from_rows(seen, FEATURES, SPECS["tiny"])
    unseen_table = table_from_rows(unseen, FEATURES, SPECS["tiny"])
    texts = [objective.collate(rows, draws)["drop_text"] for rows in (table, unseen_table)]
    assert torch.equal(*texts)


def test_statistics_of_conditions_are_those_of_the_rows_with_video(half_seen: Path, tmp_path: Path) -> None:
    fit_starting_policy("tiny", 0, str(half_seen / "features"), "train", tmp_path / "start")
    fitted = Policy.load(tmp_path / "start").network.condition_statistics
    assert fitted is not None
    rows = [feature_row(np.random.default_rng(index), "x", "train") for index in range(0, 40, 2)]
    for name, mean in (("clip_features", fitted.clip_mean), ("sync_features", fitted.sync_mean)):
        tokens = np.concatenate([np.asarray(row[name], np.float64) for row in rows])
        np.testing.assert_allclose(mean.numpy(), tokens.mean(axis=0), atol=1e-6)
