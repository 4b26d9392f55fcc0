"""Files are surveyed for length, size and scenes: whole files in pieces, nothing rejected, killed and resumed."""

from pathlib import Path

import numpy as np
import pytest

from models.spec import SPECS
from pipelines.data.media_write import wav_bytes, write_mp4
from pipelines.data.storage import open_folder
from pipelines.data.survey import (
    PIECE_S,
    RATE_HZ,
    SurveySettings,
    file_key,
    scene_starts,
    survey_files,
    survey_units,
)
from pipelines.data.units import HERE, done_units
from tests.pipelines.clip_factory import tone
from tests.pipelines.deaths import dies_after

TINY = SPECS["tiny"]
SETTINGS = SurveySettings(scenes=True, max_pixels=1 << 22, timeout_s=60.0)


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
    (facts,) = survey_files([{"uri": str(path)}], SETTINGS, TINY, out=str(tmp_path / "s"), pool=HERE).values()
    assert facts.length_s == pytest.approx(70.0, abs=0.15)
    assert (facts.width, facts.height) == (64, 48)
    assert facts.cuts_s is not None
    assert facts.cuts_s == pytest.approx([20.0, 60.0, 65.5], abs=1 / RATE_HZ)


def test_without_scenes_the_picture_is_not_decoded_and_cuts_are_unknown(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "a.mp4", [2.0, 2.0])
    header_only = SurveySettings(scenes=False, max_pixels=1 << 22, timeout_s=60.0)
    (facts,) = survey_files([{"uri": str(path)}], header_only, TINY, out=str(tmp_path / "s"), pool=HERE).values()
    assert facts.length_s == pytest.approx(4.0, abs=0.15)
    assert facts.cuts_s is None


def test_what_cannot_be_opened_is_null_and_no_file_is_lost(tmp_path: Path) -> None:
    good = write_scenes(tmp_path / "good.mp4", [2.0, 2.0])
    (tmp_path / "text.mp4").write_text("no media")
    (tmp_path / "sound.wav").write_bytes(wav_bytes(tone(1.5, 16_000)[0], 16_000))
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:200])
    names = ["good.mp4", "text.mp4", "sound.wav", "cut.mp4", "gone.mp4"]
    files = [{"uri": str(tmp_path / name)} for name in (*names, "good.mp4")]
    found = survey_files(files, SETTINGS, TINY, out=str(tmp_path / "s"), pool=HERE)
    assert set(found) == {file_key(str(tmp_path / name)) for name in names}
    by_name = {Path(key).name: facts for key, facts in found.items()}
    for name in ("text.mp4", "cut.mp4", "gone.mp4"):
        assert set(vars(by_name[name]).values()) == {None}
    assert by_name["sound.wav"].length_s == pytest.approx(1.5, abs=0.05)
    assert by_name["sound.wav"].width is None
    assert by_name["good.mp4"].cuts_s == pytest.approx((2.0,), abs=1 / RATE_HZ)


def test_a_survey_that_was_killed_goes_on_and_equals_one_that_was_not(tmp_path: Path) -> None:
    paths = [write_scenes(tmp_path / f"{i:02d}.mp4", [1.0 + i / 8, 1.0]) for i in range(20)]
    files = [{"uri": str(path)} for path in paths]
    quiet = survey_files(files, SETTINGS, TINY, out=str(tmp_path / "quiet"), pool=HERE)
    dies_after(1, lambda: survey_files(files, SETTINGS, TINY, out=str(tmp_path / "storm"), pool=HERE))
    before = done_units(open_folder(str(tmp_path / "storm")))
    assert len(before) == 1 < len(survey_units(files))
    assert survey_files(files, SETTINGS, TINY, out=str(tmp_path / "storm"), pool=HERE) == quiet


def test_members_of_one_tar_are_files_of_their_own() -> None:
    members = [{"uri": "/d/a.tar", "offset": o, "size_bytes": 9} for o in (512, 2048, 512)]
    (unit,) = survey_units([*members, {"uri": "/d/b\n.mp4"}])
    assert [row["clip_id"] for row in unit.rows] == ["/d/a.tar@2048", "/d/a.tar@512", "/d/b%0A.mp4"]


def test_no_window_of_a_scene_holds_a_cut_and_every_scene_gives_all_it_can() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        end_s = float(rng.uniform(1, 60))
        cuts = sorted(float(c) for c in rng.uniform(0, 60, rng.integers(0, 6)))
        clip_s, hop_s = float(rng.uniform(1, 9)), float(rng.uniform(0.5, 9))
        starts = scene_starts(cuts, start_s=0.0, end_s=end_s, clip_s=clip_s, hop_s=hop_s)
        assert starts == sorted(set(starts))
        for start in starts:
            assert start + clip_s <= end_s + 0.002
            assert not [c for c in cuts if start < c < start + clip_s + 1 / RATE_HZ - 0.002 and c < end_s]
        scenes = np.diff([0.0, *(c for c in cuts if c < end_s), end_s])
        assert len(starts) >= sum(math_floor((s - clip_s - 1 / RATE_HZ) / hop_s) + 1 for s in scenes)


def math_floor(value: float) -> int:
    return max(int(np.floor(value)), -1)


def test_scenes_begin_their_own_count_of_hops() -> None:
    assert scene_starts([10.0], start_s=1.0, end_s=21.0, clip_s=4.0, hop_s=4.0) == [1.0, 5.0, 10.0, 14.0]
