"""Files are surveyed for length, size and scenes: whole files in pieces, nothing rejected, killed and resumed."""

import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from models.spec import SPECS
from pipelines.data.commits import done_units
from pipelines.data.media_folder import list_videos
from pipelines.data.media_write import wav_bytes, write_mp4
from pipelines.data.plan import SURVEY_SCHEMA, FileSurvey, files_to_survey
from pipelines.data.storage import open_folder
from pipelines.data.survey import FILES_PER_UNIT, PIECE_S, RATE_HZ, SurveySettings, survey_files
from pipelines.data.units import HERE
from tests.pipelines.clip_factory import tone
from tests.pipelines.deaths import dies_after

TINY = SPECS["tiny"]
SETTINGS = SurveySettings(scenes=True, max_pixels=1 << 22, timeout_s=60.0)


def files_of(*paths: Path) -> pa.Table:
    """What a plan asks to be surveyed."""
    rows = [
        {"source": str(path), "uri": str(path).encode(), "offset": None, "size_bytes": None} for path in sorted(paths)
    ]
    return pa.Table.from_pylist(rows, SURVEY_SCHEMA)


def survey(out: Path, *paths: Path, settings: SurveySettings = SETTINGS) -> dict[str, FileSurvey]:
    return survey_files(files_of(*paths), settings, TINY, out=str(out), pool=HERE)


def write_scenes(path: Path, lengths_s: list[float], rate_hz: int = 8) -> Path:
    """An mp4 with sound, of still pictures that follow each other by hard cuts."""
    rng = np.random.default_rng(len(lengths_s))
    scenes = [
        np.repeat(np.kron(rng.integers(0, 256, (4, 4, 3), np.uint8), np.ones((12, 16, 1), np.uint8))[None], n, 0)
        for n in (round(seconds * rate_hz) for seconds in lengths_s)
    ]
    write_mp4(path, np.concatenate(scenes), rate_hz, tone(sum(lengths_s), 16_000)[0], 16_000)
    return path


def test_length_size_and_the_cuts_of_every_piece_are_found(tmp_path: Path) -> None:
    # Cuts inside the first piece, at the very border of the second, and inside it.
    path = write_scenes(tmp_path / "long.mp4", [20.0, PIECE_S - 20.0, 5.5, 4.5])
    (facts,) = survey(tmp_path / "s", path).values()
    assert facts.length_s == pytest.approx(70.0, abs=0.15)
    assert facts.cuts_s == pytest.approx([20.0, 60.0, 65.5], abs=1 / RATE_HZ)


def test_without_scenes_the_picture_is_not_decoded_and_cuts_are_unknown(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "a.mp4", [2.0, 2.0])
    header_only = SurveySettings(scenes=False, max_pixels=1 << 22, timeout_s=60.0)
    (facts,) = survey(tmp_path / "s", path, settings=header_only).values()
    assert facts.length_s == pytest.approx(4.0, abs=0.15)
    assert facts.cuts_s == ()


def test_what_cannot_be_opened_is_null_and_no_file_is_lost(tmp_path: Path) -> None:
    good = write_scenes(tmp_path / "good.mp4", [2.0, 2.0])
    (tmp_path / "text.mp4").write_text("no media")
    (tmp_path / "sound.wav").write_bytes(wav_bytes(tone(1.5, 16_000)[0], 16_000))
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:200])
    names = ["good.mp4", "text.mp4", "sound.wav", "cut.mp4", "gone.mp4"]
    found = survey(tmp_path / "s", *(tmp_path / name for name in names))
    assert set(found) == {str(tmp_path / name) for name in names}
    by_name = {Path(key).name: facts for key, facts in found.items()}
    for name in ("text.mp4", "cut.mp4", "gone.mp4"):
        assert by_name[name] == FileSurvey()
    assert by_name["sound.wav"].length_s == pytest.approx(1.5, abs=0.05)
    assert by_name["good.mp4"].cuts_s == pytest.approx((2.0,), abs=1 / RATE_HZ)


def test_a_survey_that_was_killed_goes_on_and_equals_one_that_was_not(tmp_path: Path) -> None:
    paths = [write_scenes(tmp_path / f"{i:02d}.mp4", [1.0 + i / 8, 1.0]) for i in range(20)]
    quiet = survey(tmp_path / "quiet", *paths)
    dies_after(1, lambda: survey(tmp_path / "storm", *paths))
    before = done_units(open_folder(str(tmp_path / "storm")))
    assert len(before) == 1 < len(paths) / FILES_PER_UNIT
    assert survey(tmp_path / "storm", *paths) == quiet


def test_members_of_one_tar_are_surveyed_by_their_place_in_it(tmp_path: Path) -> None:
    for name, seconds in (("a", 2.0), ("b", 3.0)):
        write_scenes(tmp_path / f"{name}.mp4", [seconds, 1.0])
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in ("a", "b"):
            tar.add(tmp_path / f"{name}.mp4", f"{name}.mp4")
    files = files_to_survey(list_videos(str(tmp_path / "shard.tar")))
    found = survey_files(files, SETTINGS, TINY, out=str(tmp_path / "s"), pool=HERE)
    cuts = {key.rpartition("/")[2]: facts.cuts_s for key, facts in found.items()}
    assert cuts == {"a.mp4": (2.0,), "b.mp4": (3.0,)}
