"""Files of sound alone become rows without video: only where it is asked for, whole, and such that they verify."""

import re
from pathlib import Path

import numpy as np
import pytest

from models.spec import SPECS
from pipelines.curation.curate import curate, plan_curation
from pipelines.curation.measure import measure
from pipelines.curation.report import ReportSettings
from pipelines.data.contracts import FEATURES
from pipelines.data.decoding import Decoder
from pipelines.data.ingest import Sources, gather_entries
from pipelines.data.measured import MEASURED
from pipelines.data.media_write import decode_flac
from pipelines.data.preprocess import preprocess
from pipelines.data.preprocess_settings import PreprocessSettings
from pipelines.data.store import Dataset
from pipelines.data.tables import column_to_numpy
from pipelines.data.units import HERE
from pipelines.data.verify import check_files, check_rows
from pipelines.errors import InputError, StageConflict
from pipelines.evaluation.contact_sheet import contact_sheet
from pipelines.evaluation.dataset_card import dataset_card
from pipelines.stage import untracked
from tests.pipelines.clip_factory import simple_clip, tone, write_clip
from tests.pipelines.tar_factory import write_tar

TINY = SPECS["tiny"]
PICTURE = ("motion", "static_share", "brightness", "num_cuts", "cuts_s", "source_width", "source_height", "source_fps")


def make(sources: Sources, out: Path, **options: object) -> Dataset:
    settings = PreprocessSettings(spec="tiny", encoders="grids", **options)  # pyright: ignore[reportArgumentType]
    return preprocess(gather_entries(sources), settings, out=str(out), pool=HERE, max_reject_rate=1.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clips/ of sounds in every container, one with a picture, one too short; features/ of it, without pictures."""
    folder = tmp_path_factory.mktemp("sounds")
    clips = folder / "clips"
    clips.mkdir()
    wave = tone(3.0, 48_000, 1200.0, 0.5)
    for name, codec in (
        ("wav.wav", "pcm_s16le"),
        ("mp3.mp3", "libmp3lame"),
        ("flac.flac", "flac"),
        ("vorbis.ogg", "libopus"),
        ("m4a.m4a", "aac"),
        ("silent_film.mp4", "aac"),
    ):
        write_clip(clips / name, None, wave, audio_codec=codec)
    simple_clip(clips / "video.mp4")
    write_clip(clips / "short.wav", None, wave[:, :48_000], audio_codec="pcm_s16le")
    names = sorted(path.name for path in clips.iterdir())
    (clips / "clips.csv").write_text("\n".join(["video,caption", *(f"{name},a tone of {name}" for name in names)]))
    make(Sources(manifest=str(clips / "clips.csv"), audio_only=True), folder / "features", audio_only=True)
    return folder


def test_sound_of_every_container_becomes_a_row_of_sound_and_words(made: Path) -> None:
    dataset = Dataset.open(str(made / "features"), FEATURES)
    table = dataset.read()
    rows = {row["clip_id"]: row for row in table.to_pylist()}
    assert sorted(rows) == ["flac", "m4a", "mp3", "silent_film", "video", "vorbis", "wav"]
    assert dataset.read_rejects()["reason"].to_pylist() == ["too_short"]
    assert (dataset.num_without_video(), dataset.num_without_video("val")) == (7, 0)
    for name, row in rows.items():
        assert (row["has_video"], row["frames"], row["valid_s"]) == (False, [], 2.5), name
        sound = decode_flac(row["audio"])
        assert sound.shape == (TINY.num_samples,)
        assert {key for key, value in row["measures"].items() if value is None} == set(PICTURE), name
        assert set(row["measures"]) == {key for key, _, _ in MEASURED}
        if name != "video":
            spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
            assert np.argmax(spectrum) * 16_000 / len(sound) == pytest.approx(1200.0, abs=1.0), name
    for name in ("clip_features", "sync_features"):
        assert not column_to_numpy(table[name]).any()
    for name in ("text_features", "latent_mean"):
        assert column_to_numpy(table[name]).any(axis=(1, 2)).all()


def test_such_rows_verify_and_are_shown_and_counted(made: Path) -> None:
    location = str(made / "features")
    assert check_files(location) == []
    assert {check.outcome for check in check_rows(location, count=9, seed=0)} == {"equal"}
    assert re.search(r"^without video +7 rows$", dataset_card(location), re.MULTILINE)
    assert contact_sheet(Dataset.open(location, FEATURES), 2).startswith(b"\x89PNG")


def test_such_rows_are_measured_and_curated_by_their_sound(made: Path, tmp_path: Path) -> None:
    features, measures = str(made / "features"), str(tmp_path / "measures")
    measure(features, None, out=measures, pool=HERE, report=ReportSettings(num_examples=1), track=untracked)
    assert (tmp_path / "measures" / "report" / "index.html").is_file()
    plan = plan_curation(features, measures, ["source_rate_hz >= 40000"])
    curate(plan, out=str(tmp_path / "curated"), pool=HERE, track=untracked)
    kept = Dataset.open(str(tmp_path / "curated"), FEATURES)
    # The sound of the video is at 16 kHz.
    assert kept.num_without_video() == 6 == kept.num_rows()
    assert set(plan_curation(features, measures, ["motion >= 0"]).dropped) == set(
        kept.read(["clip_id"])["clip_id"].to_pylist()
    ) | {"video"}


def test_a_video_has_the_sound_that_it_has_with_its_picture(made: Path, tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("video,caption\nvideo.mp4,a tone of video.mp4\nwav.wav,\n")
    for name in ("video.mp4", "wav.wav"):
        (tmp_path / name).write_bytes((made / "clips" / name).read_bytes())
    seen = make(Sources(manifest=str(tmp_path / "clips.csv")), tmp_path / "out")
    # Without the option a file of sound is what it always was.
    assert seen.read_rejects()["reason"].to_pylist() == ["no_video"]
    columns = ["audio", "text_features", "latent_mean", "content_hash"]
    heard = Dataset.open(str(made / "features"), FEATURES).read(columns, clip_ids=["video"])
    assert seen.read(columns).to_pylist() == heard.to_pylist()
    assert seen.read(["has_video"])["has_video"].to_pylist() == [True]
    with pytest.raises(StageConflict, match="audio_only: false there, true asked"):
        make(Sources(manifest=str(tmp_path / "clips.csv")), tmp_path / "out", audio_only=True)


def test_folders_lists_and_tars_name_their_sounds_where_it_is_asked_for(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    for name in ("a.mp3", "b.opus", "c.mp4", "c.wav", "d.wav", "d.flac", "notes.txt"):
        videos.mkdir(exist_ok=True)
        (videos / name).write_bytes(b"x")
    (tmp_path / "ids.txt").write_text("a.mp3\nb\nc\nd\n")
    write_tar(tmp_path / "s.tar", {path.name: b"x" for path in sorted(videos.iterdir())} | {"d.txt": b"words"})

    def found(**given: str) -> list[tuple[str, str | None]]:
        rows = gather_entries(Sources(**given, audio_only=True)).rows()  # pyright: ignore[reportArgumentType]
        assert {row["reason"] for row in rows} == {None}
        return sorted((row["video"].rpartition("/")[2], row["sound_uri"]) for row in rows)

    beside = str(videos / "c.wav")
    listed = [("a.mp3", None), ("b.opus", None), ("c.mp4", beside), ("d.flac", None)]
    assert found(manifest=str(tmp_path / "ids.txt"), videos=str(videos)) == listed
    in_tar = found(videos=str(tmp_path / "s.tar"))
    assert in_tar == [("a.mp3", None), ("b.opus", None), ("c.mp4", str(tmp_path / "s.tar")), ("d.wav", None)]
    (videos / "c.wav").unlink()
    (videos / "d.flac").unlink()
    assert found(videos=str(videos)) == [("a.mp3", None), ("b.opus", None), ("c.mp4", None), ("d.wav", None)]
    plain = gather_entries(Sources(videos=str(videos))).rows()
    assert [row["video"] for row in plain] == ["c.mp4"]


def test_windows_follow_the_sound_and_scenes_need_a_picture(tmp_path: Path) -> None:
    frames = [np.full((32, 48, 3), 90, np.uint8)] * 25
    write_clip(tmp_path / "long.mp4", frames, tone(5.5, 48_000))
    with Decoder() as decoder:
        info = decoder.probe(tmp_path / "long.mp4", 1 << 22)
    assert info.duration_s == pytest.approx(1.0, abs=0.1)
    assert info.sound_s == pytest.approx(5.5, abs=0.1)
    dataset = make(Sources(videos=str(tmp_path), audio_only=True), tmp_path / "out", audio_only=True, windows="all")
    assert dataset.read(["clip_id"])["clip_id"].to_pylist() == ["long#0", "long#2500"]
    with pytest.raises(InputError, match="--windows scenes looks for cuts in the picture"):
        PreprocessSettings(spec="tiny", encoders="grids", windows="scenes", audio_only=True)
