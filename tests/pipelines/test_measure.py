"""Measures of a features dataset: one flat row a clip, correspondence by a reward, killed and resumed, and a page."""

import math
from pathlib import Path

import pytest
import torch

from models.reward import Reward
from pipelines.curation.measure import MeasureWorker, measure
from pipelines.curation.report import PAGE, ReportSettings
from pipelines.data.clip_units import row_group_units
from pipelines.data.commits import done_units
from pipelines.data.contracts import FEATURES, MEASURES
from pipelines.data.frames import decode_frames
from pipelines.data.measured import MEASURED
from pipelines.data.media_write import decode_flac
from pipelines.data.storage import open_folder
from pipelines.data.store import CHECKPOINT, Dataset, open_files
from pipelines.data.units import HERE
from pipelines.errors import InputError
from pipelines.stage import untracked
from tests.feature_factory import write_features
from tests.pipelines.deaths import dies_after
from tests.world_factory import write_reward, write_world

SPLITS = {"train": 4, "rpo": 3, "val": 3, "test": 2}
REPORT = ReportSettings(num_examples=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of rendered clips, the frames of one of them spoilt, and a reward that was calibrated on others."""
    folder = tmp_path_factory.mktemp("measured")
    write_world(folder / "features", SPLITS, spoilt=("rpo_001",))
    write_reward(folder / "reward", folder / "features")
    run(folder / "features", folder / "reward", folder / "m")
    return folder


def run(features: Path, reward: Path | None, out: Path) -> Dataset:
    measure(
        str(features),
        None if reward is None else str(reward),
        out=str(out),
        pool=HERE,
        report=REPORT,
        track=untracked,
        say=lambda line: None,
    )
    return Dataset.open(str(out), MEASURES)


def test_every_clip_has_a_row_with_the_measures_of_its_features(world: Path) -> None:
    features = Dataset.open(str(world / "features"), FEATURES).read(["clip_id", "split", "valid_s", "measures"])
    rows = Dataset.open(str(world / "m"), MEASURES).read().to_pylist()
    assert len(rows) == sum(SPLITS.values())
    for clip, row in zip(features.to_pylist(), rows, strict=True):
        assert [clip[name] for name in ("clip_id", "split", "valid_s")] == [
            row[n] for n in ("clip_id", "split", "valid_s")
        ]
        assert clip["measures"] == {name: row[name] for name, _, _ in MEASURED}


def test_correspondence_is_what_the_reward_says_of_the_stored_clip(world: Path) -> None:
    reward = Reward.load(open_files(str(world / "reward"), CHECKPOINT)[0].local_path())
    features = Dataset.open(str(world / "features"), FEATURES)
    found = {row["clip_id"]: row for row in Dataset.open(str(world / "m"), MEASURES).read().to_pylist()}
    for clip in features.read(["clip_id", "frames", "audio"], split="test").to_pylist():
        video = torch.from_numpy(decode_frames(clip["frames"])).permute(0, 3, 1, 2).float() / 255
        wave = torch.from_numpy(decode_flac(clip["audio"]))[None]
        (score,) = reward.score(reward.video_features(video[None]), wave, features.spec.sample_rate_hz)
        row = found[clip["clip_id"]]
        assert row["semantic"] == pytest.approx(score.semantic, abs=1e-6)
        assert row["temporal"] == pytest.approx(score.temporal, abs=1e-6)
        assert row["reward"] == pytest.approx(score.total, abs=1e-5)
        assert row["offset_s"] == pytest.approx(score.offset_s)
        assert row["reward_invalid"] is None
        assert math.isfinite(row["reward"])


def test_a_clip_whose_media_cannot_be_read_keeps_its_row_and_says_why(world: Path) -> None:
    (row,) = Dataset.open(str(world / "m"), MEASURES).read(clip_ids=["rpo_001"]).to_pylist()
    assert row["reward"] is row["offset_s"] is None
    assert row["reward_invalid"].startswith("not_media")
    assert row["peak"] > 0


def test_without_a_reward_nothing_heavy_is_read_and_nothing_is_said_of_correspondence(tmp_path: Path) -> None:
    # Frames and sound of these clips are not decodable at all.
    features = Dataset.open(str(write_features(tmp_path / "f", {"train": 5})), FEATURES)
    (unit,) = row_group_units(features)
    table, rejects = MeasureWorker(features, None).process(unit, lambda: None)
    assert table.num_rows == 5
    assert not rejects.num_rows
    for name in ("semantic", "temporal", "reward", "offset_s", "reward_invalid"):
        assert table[name].null_count == 5


def test_a_measuring_that_was_killed_goes_on_and_equals_one_that_was_not(world: Path, tmp_path: Path) -> None:
    arguments = (world / "features", world / "reward", tmp_path / "m")
    dies_after(2, lambda: run(*arguments))
    assert len(done_units(open_folder(str(tmp_path / "m")))) == 2
    resumed, quiet = run(*arguments), Dataset.open(str(world / "m"), MEASURES)
    assert resumed.digest == quiet.digest
    assert (tmp_path / "m" / PAGE).read_bytes() == (world / "m" / PAGE).read_bytes()
    assert resumed.manifest["files"] == quiet.manifest["files"]


def test_the_page_stands_in_the_manifest_with_every_file_it_names(world: Path) -> None:
    text = (world / "m" / PAGE).read_text()
    listed = {entry["path"] for entry in Dataset.open(str(world / "m"), MEASURES).manifest["files"]}
    sources = {f"report/{piece.split(chr(34))[0]}" for piece in text.split('src="')[1:]}
    assert sources | {PAGE} == listed
    assert all((world / "m" / path).stat().st_size for path in listed)
    assert "cannot be shown: not_media" in text or "rpo_001" not in text


def test_features_without_rows_and_a_reward_that_is_none_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a dataset, expected a checkpoint"):
        run(world / "features", world / "features", tmp_path / "x")
    write_features(tmp_path / "empty", {})
    with pytest.raises(InputError, match="no rows to measure"):
        run(tmp_path / "empty", None, tmp_path / "y")
    assert not (tmp_path / "x").exists()
