"""verify finds what was changed behind the manifest's back, and makes rows again from their sources."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.contracts import FEATURES
from pipelines.data.ingest import read_entries
from pipelines.data.preprocess import preprocess
from pipelines.data.preprocess_settings import PreprocessSettings
from pipelines.data.storage import open_folder
from pipelines.data.store import encode_part
from pipelines.data.tables import table_from_rows
from pipelines.data.units import HERE
from pipelines.data.verify import check_files, check_rows, column_differences, summarise
from pipelines.errors import InputError
from tests.pipelines.clip_factory import simple_clip
from tests.pipelines.row_factory import TINY, make_row


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clips/ and features/ of five clips, one of them bad."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "clips").mkdir()
    for index in range(4):
        simple_clip(folder / "clips" / f"c{index}.mp4")
    (folder / "clips/bad.mp4").write_bytes(b"no video")
    lines = ["video,caption", *(f"c{i}.mp4,the {i}th" for i in range(4)), "bad.mp4,"]
    (folder / "clips/clips.csv").write_text("\n".join(lines) + "\n")
    preprocess(
        read_entries(str(folder / "clips/clips.csv")),
        PreprocessSettings(spec="tiny", encoders="grids"),
        out=str(folder / "features"),
        pool=HERE,
        max_reject_rate=0.5,
    )
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage; its sources are the original ones."""
    return Path(shutil.copytree(made / "features", tmp_path / "features"))


def test_an_untouched_dataset_is_what_it_says_and_its_rows_come_out_equal(made: Path) -> None:
    assert check_files(str(made / "features")) == []
    checks = check_rows(str(made / "features"), count=3, seed=1)
    assert summarise(checks) == {"equal": 3, "close": 0, "differs": 0, "gone": 0}
    other = check_rows(str(made / "features"), count=3, seed=2)
    assert {c.clip_id for c in other} != {c.clip_id for c in checks}
    assert len(check_rows(str(made / "features"), count=99, seed=0)) == 4


def test_missing_altered_and_foreign_files_are_named(copy: Path) -> None:
    part = next((copy / "data").glob("*.parquet"))
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    (copy / "data/part-foreign.parquet").write_bytes(b"PAR1")
    next((copy / "rejects").glob("*.parquet")).unlink()
    problems = "\n".join(check_files(str(copy)))
    assert f"data/{part.name}: its sha256 is not the manifest's" in problems
    assert "data/part-foreign.parquet: not in manifest.json" in problems
    assert "rejects/part-train-000000" in problems
    assert "missing" in problems


def test_a_source_that_changed_or_vanished_is_told(made: Path) -> None:
    clip = made / "clips/c2.mp4"
    kept = clip.read_bytes()
    try:
        shutil.copy(made / "clips/c1.mp4", clip)
        changed = {c.clip_id: c for c in check_rows(str(made / "features"), count=9, seed=0)}
        assert changed["c2"].outcome == "differs"
        assert "content_hash" in changed["c2"].detail
        assert changed["c1"].outcome == "equal"
        clip.unlink()
        gone = {c.clip_id: c for c in check_rows(str(made / "features"), count=9, seed=0)}
        assert (gone["c2"].outcome, gone["c2"].detail.split(":")[0]) == ("gone", "missing")
    finally:
        clip.write_bytes(kept)


def test_columns_that_differ_are_told_with_their_largest_error() -> None:
    row = make_row(FEATURES, "a", seed=1)
    other = {**row, "caption": "another", "source": "elsewhere"}
    other["latent_mean"] = row["latent_mean"].copy()
    largest = float(np.abs(row["latent_mean"]).max())
    other["latent_mean"][0, 0] += np.float32(0.5 * largest)
    old, new = (table_from_rows([r], FEATURES, TINY) for r in (row, other))
    found = column_differences(old, new, FEATURES)
    assert set(found) == {"caption", "latent_mean"}
    assert found["caption"] is None
    assert found["latent_mean"] == pytest.approx(0.5, rel=1e-3)


def test_rows_of_a_dataset_that_was_not_made_from_files_cannot_be_made_again(tmp_path: Path) -> None:
    from tests.feature_factory import write_dataset

    table = table_from_rows([make_row(FEATURES, "a")], FEATURES, TINY)
    out = write_dataset(tmp_path / "x", FEATURES, {"train": table}, {})
    with pytest.raises(InputError, match="was made by factory from another dataset"):
        check_rows(str(out), count=1, seed=0)


def test_what_was_never_finished_is_no_artifact(tmp_path: Path) -> None:
    open_folder(tmp_path).write_bytes("data/part-a.parquet", encode_part(_one(), FEATURES, TINY))
    with pytest.raises(InputError, match="is not finished"):
        check_files(str(tmp_path))


def _one():
    return table_from_rows([make_row(FEATURES, "a")], FEATURES, TINY)
