"""Videos -> features: rows that hold what the contract says, rejects with their reasons, and nothing in between."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.codec import build_codec
from models.spec import SPECS
from pipelines.data.clip_worker import shift_events
from pipelines.data.contracts import FEATURES
from pipelines.data.frames import decode_frames
from pipelines.data.ingest import read_entries
from pipelines.data.media_folder import list_videos
from pipelines.data.media_write import decode_flac, write_mp4
from pipelines.data.preprocess import preprocess
from pipelines.data.preprocess_settings import PreprocessSettings
from pipelines.data.source import SourceReader
from pipelines.data.store import Dataset
from pipelines.data.tables import column_to_numpy
from pipelines.data.units import HERE, Pool
from pipelines.errors import InputError, MediaError, Refused, StageConflict
from tests.pipelines.clip_factory import grey_frames, simple_clip, tone, write_clip

TINY = PreprocessSettings(spec="tiny", encoders="grids")


def make(folder: Path, manifest: str, out: str = "out", *, num_workers: int = 0, **options: object) -> Dataset:
    path = folder / "clips.csv"
    path.write_text(manifest)
    settings = PreprocessSettings(spec="tiny", encoders="grids", **options)  # pyright: ignore[reportArgumentType]
    return preprocess(
        read_entries(str(path)),
        settings,
        out=str(folder / out),
        pool=Pool(num_workers=num_workers),
        max_reject_rate=1.0,
    )


def rejected(dataset: Dataset) -> dict[str, str]:
    table = dataset.read_rejects()
    return dict(zip(table["clip_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


def test_a_row_holds_the_clip_that_was_written(tmp_path: Path) -> None:
    spec = SPECS["tiny"]
    rng = np.random.default_rng(3)
    frames = np.kron(rng.integers(30, 220, (48, 8, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    wave = tone(3.0, 16_000, 1200.0, 0.5)[0]
    write_mp4(tmp_path / "Ω 1.mp4", frames, 16, wave, 16_000)
    event = {"time_s": 0.75, "duration_s": 0.1, "kind": "ball", "variant": "red"}
    events = json.dumps([event, {**event, "time_s": 0.1}]).replace('"', '""')
    dataset = make(tmp_path, f'video,start_s,caption,split,events\nΩ 1.mp4,0.25,a caption,val,"{events}"\n')
    (row,) = dataset.read().to_pylist()
    assert row["clip_id"] == "Ω 1"
    assert (row["start_s"], row["duration_s"], row["valid_s"]) == (0.25, 2.5, 2.5)
    assert (row["caption"], row["split"]) == ("a caption", "val")
    assert row["events"] == [{**event, "time_s": 0.5}]
    stored = decode_frames(row["frames"])
    assert stored.shape == (spec.frames_len, 64, 64, 3)
    assert np.abs(stored.astype(float) - frames[4:44]).mean() < 12
    sound = decode_flac(row["audio"])
    assert sound.shape == (spec.num_samples,)
    assert np.corrcoef(sound[800:-800], wave[4000:44_000][800:-800])[0, 1] > 0.99
    table = dataset.read()
    mean, std = build_codec("tiny").encode(torch.from_numpy(sound)[None])
    np.testing.assert_array_equal(column_to_numpy(table["latent_mean"]), mean.numpy())
    np.testing.assert_array_equal(column_to_numpy(table["latent_std"]), std.numpy())
    assert column_to_numpy(table["sync_features"]).shape == (1, 40, 576)
    assert column_to_numpy(table["text_features"]).any()
    assert dataset.splits == {"val": 1}


def test_every_bad_file_is_a_reject_with_its_reason_and_the_counts_add_up(tmp_path: Path) -> None:
    simple_clip(tmp_path / "good.mp4")
    simple_clip(tmp_path / "other.mkv", 3.0, rate_hz=48_000, frame_rate=25)
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "random.mp4").write_bytes(np.random.default_rng(0).bytes(3000))
    content = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    write_clip(tmp_path / "film.mp4", grey_frames([60] * 63), None)
    write_clip(tmp_path / "radio.mp4", None, tone(2.5, 48_000))
    write_clip(tmp_path / "silent.mp4", grey_frames([60] * 63), tone(2.5, 48_000, 440.0, 0.0))
    write_clip(tmp_path / "short.mp4", grey_frames([60] * 30), tone(1.2, 48_000))
    (tmp_path / "folder.mp4").mkdir()
    names = "good.mp4 other.mkv zero.mp4 random.mp4 cut.mp4 film.mp4 radio.mp4 silent.mp4 short.mp4 folder.mp4 gone.mp4"
    listed = "\n".join([*names.split(), "/etc/passwd", "good.mp4"])
    dataset = make(tmp_path, f"video\n{listed}\n")
    assert dataset.read(["clip_id"])["clip_id"].to_pylist() == ["good", "other"]
    assert rejected(dataset) == {
        "zero": "empty",
        "random": "not_media",
        "cut": "truncated",
        "film": "no_audio",
        "radio": "no_video",
        "silent": "silent",
        "short": "too_short",
        "folder": "not_media",
        "gone": "missing",
        "passwd": "bad_uri",
    }
    assert dataset.manifest["counts"] == {"in": 12, "out": 2, "rejected": 10, "repeated": 1}


def test_too_many_rejects_refuse_the_finished_dataset_and_missing_files_do_not_count(tmp_path: Path) -> None:
    simple_clip(tmp_path / "good.mp4")
    (tmp_path / "zero.mp4").write_bytes(b"")
    path = tmp_path / "clips.csv"
    path.write_text("video\ngood.mp4\nzero.mp4\ngone.mp4\n")

    def run(rate: float) -> Dataset:
        entries = read_entries(str(path))
        return preprocess(entries, TINY, out=str(tmp_path / "out"), pool=HERE, max_reject_rate=rate)

    with pytest.raises(Refused, match="1 of 3 clips were rejected"):
        run(0.3)
    # The dataset is there: asked again with a higher rate, the stage is skipped and passes.
    assert run(0.34).num_rows() == 1
    path.write_text("video\ngone.mp4\n")
    with pytest.raises(Refused, match="none of 1 clips"):
        preprocess(read_entries(str(path)), TINY, out=str(tmp_path / "none"), pool=HERE, max_reject_rate=1.0)


def test_all_windows_of_a_file_become_rows_of_their_own(tmp_path: Path) -> None:
    simple_clip(tmp_path / "long.mp4", 8.0)
    simple_clip(tmp_path / "just.mp4", 2.5)
    (tmp_path / "zero.mp4").write_bytes(b"")
    manifest = "video\nlong.mp4\njust.mp4\nzero.mp4\n"
    dataset = make(tmp_path, manifest, windows="all", hop_s=2.75)
    table = dataset.read(["clip_id", "start_s", "content_hash"])
    assert table["clip_id"].to_pylist() == ["just", "long#0", "long#2750", "long#5500"]
    assert len(set(table["content_hash"].to_pylist())) == 4
    assert rejected(dataset) == {"zero": "empty"}
    first = make(tmp_path, manifest, "first").read(["clip_id", "content_hash", "latent_mean"])
    assert first["clip_id"].to_pylist() == ["just", "long"]
    # The same bytes and window are the same clip, whatever it is called.
    assert first["content_hash"][1].as_py() == table["content_hash"][1].as_py()


def test_another_configuration_is_refused_and_the_same_one_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simple_clip(tmp_path / "a.mp4")
    first = make(tmp_path, "video\na.mp4\n")
    capsys.readouterr()
    assert make(tmp_path, "video\na.mp4\n").digest == first.digest
    assert "skip" in capsys.readouterr().out
    with pytest.raises(StageConflict, match="max_pixels"):
        make(tmp_path, "video\na.mp4\n", max_pixels=1 << 20)
    with pytest.raises(StageConflict, match="manifest"):
        make(tmp_path, "video,caption\na.mp4,dog\n")


@pytest.mark.parametrize(("spec", "encoders"), [("tiny", "clip"), ("16k", "grids"), ("huge", "grids")])
def test_encoders_and_specs_that_do_not_exist_stop_before_anything_is_written(
    tmp_path: Path, spec: str, encoders: str
) -> None:
    simple_clip(tmp_path / "a.mp4")
    entries = list_videos(str(tmp_path))

    def run() -> None:
        settings = PreprocessSettings(spec=spec, encoders=encoders)
        preprocess(entries, settings, out=str(tmp_path / "out"), pool=HERE)

    with pytest.raises(InputError):
        run()
    assert not (tmp_path / "out").exists()


def test_the_place_of_the_files_does_not_change_the_digest(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        for clip in ("a.mp4", "b.mp4"):
            simple_clip(tmp_path / name / clip)
    digests = {make(tmp_path / name, "video\na.mp4\nb.mp4\n").digest for name in ("here", "there")}
    assert len(digests) == 1


def test_events_are_told_from_the_start_of_the_window() -> None:
    event = {"duration_s": 0.1, "kind": "lamp", "variant": "cyan"}
    events = [{**event, "time_s": t} for t in (0.9, 1.0, 2.0, 3.5)]
    assert shift_events(events, 1.0, 2.5) == [{**event, "time_s": 0.0}, {**event, "time_s": 1.0}]
    assert shift_events([], 1.0, 2.5) == []
    assert shift_events(None, 1.0, 2.5) is None


def test_a_source_is_hashed_by_its_bytes(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "x"
    reader = SourceReader()
    for content in (b"one", b"another"):
        path.write_bytes(content)
        with reader.open(str(path)) as media:
            assert media.sha256 == hashlib.sha256(content).hexdigest()
    for name, reason in (("gone", "missing"), (".", "not_media")):
        with pytest.raises(MediaError) as caught, reader.open(str(tmp_path / name)):
            pass
        assert caught.value.reason == reason


@pytest.mark.ray
def test_the_number_of_workers_does_not_change_the_digest(tmp_path: Path, ray_cluster: None) -> None:
    listed = []
    for split in ("train", "val", "test"):
        for i in range(3):
            simple_clip(tmp_path / f"{split}{i}.mp4")
            listed.append(f"{split}{i}.mp4,{split}")
    manifest = "video,split\n" + "\n".join(listed) + "\n"
    alone = make(tmp_path, manifest, "alone")
    assert alone.num_rows() == 9
    assert make(tmp_path, manifest, "pool", num_workers=2).digest == alone.digest
    assert Dataset.open(str(tmp_path / "pool"), FEATURES).splits == {"test": 3, "train": 3, "val": 3}


def test_windows_of_scenes_keep_clear_of_every_cut(tmp_path: Path) -> None:
    pictures = [np.full((64, 64, 3), level, np.uint8) for level in (30, 220) for _ in range(16 * 6)]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 20, (len(pictures), 64, 64, 3), np.uint8)
    frames = [picture + extra for picture, extra in zip(pictures, noise, strict=True)]
    write_clip(tmp_path / "two.mp4", frames, tone(12.0, 16_000), rate_hz=16_000, frame_rate=16)
    made = make(tmp_path, "video\ntwo.mp4\n", windows="scenes", hop_s=2.5)
    starts = made.read(["start_s"])["start_s"].to_pylist()
    assert sorted(starts) == [0.0, 2.5, 6.0, 8.5]
    assert {entry["num_cuts"] for entry in made.read(["measures"])["measures"].to_pylist()} == {0}


def test_the_sound_of_a_sibling_file_is_taken(tmp_path: Path) -> None:
    from pipelines.data.ingest import Sources, gather_entries
    from pipelines.data.media_write import wav_bytes

    simple_clip(tmp_path / "a.mp4")
    (tmp_path / "a.wav").write_bytes(wav_bytes(tone(2.5, 16_000, 1000.0)[0], 16_000))
    (tmp_path / "ids.txt").write_text("a\n")
    entries = gather_entries(Sources(manifest=str(tmp_path / "ids.txt"), videos=str(tmp_path)))
    made = preprocess(entries, TINY, out=str(tmp_path / "out"), pool=HERE)
    wave = decode_flac(made.read(["audio"])["audio"][0].as_py())
    spectrum = np.abs(np.fft.rfft(wave))
    assert np.argmax(spectrum) * 16_000 / len(wave) == pytest.approx(1000.0, abs=1.0)


@pytest.mark.parametrize("windows", ["first", "all"])
def test_a_file_longer_than_allowed_is_one_reject(tmp_path: Path, windows: str) -> None:
    simple_clip(tmp_path / "short.mp4", 5.0)
    simple_clip(tmp_path / "long.mp4", 10.0)
    made = make(tmp_path, "video\nshort.mp4\nlong.mp4\n", windows=windows, max_file_s=6.0)
    assert rejected(made) == {"long": "too_long"}
    assert "10.0 s by its header, 6 s are allowed" in made.read_rejects()["detail"][0].as_py()
    assert made.num_rows() == (1 if windows == "first" else 2)


def test_a_row_tells_of_the_streams_it_came_from(tmp_path: Path) -> None:
    frames = [np.full((48, 80, 3), level, np.uint8) for level in range(50, 130)]
    stereo = np.concatenate([tone(3.2, 44_100), tone(3.2, 44_100, 660.0)])
    write_clip(tmp_path / "a.mkv", frames, stereo, rate_hz=44_100, layout="stereo", audio_codec="flac")
    (measured,) = make(tmp_path, "video\na.mkv\n").read(["measures"])["measures"].to_pylist()
    told = {name: value for name, value in measured.items() if name.startswith("source_")}
    assert told == {
        "source_width": 80,
        "source_height": 48,
        "source_fps": 25.0,
        "source_rate_hz": 44_100,
        "source_channels": 2,
    }
