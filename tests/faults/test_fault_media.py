"""Lines 1 to 11 of the list of faults, each with real files through the whole of `preprocess()`; and 21 for the child.

The reader's own tests (`tests/pipelines/test_media.py`) look at the same faults from within; here a folder of clips
goes in, and what is asked is the row or the reject that comes out.
"""

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import cli
from jobs.generate import Options, main
from models.spec import SPECS
from pipelines.data.frames import decode_frames
from pipelines.data.media_write import decode_flac
from pipelines.data.store import Dataset
from pipelines.errors import Refused
from pipelines.peak_memory import peak_memory, restart_peak
from tests.demo_factory import write_untrained_policy
from tests.faults.media_faults import (
    compressed_header_bomb,
    frequency_of,
    huge_h264,
    made,
    number_of,
    outcomes,
    overwrite,
    patched,
    resized_vp8,
    write_cover_art,
    write_hours,
    write_no_frames,
    write_numbered,
)
from tests.fuzz.seeds import ROW, SEEDS, Seed, write_seed
from tests.fuzz.worker import Call, watched
from tests.pipelines.clip_factory import beep, grey_frames, tone, write_clip

TINY = SPECS["tiny"]
MIB = 1 << 20
CUT = [seed for seed in SEEDS if seed.expected == ROW]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    return tmp_path / "clips"


def sounds(dataset: Dataset) -> dict[str, np.ndarray]:
    table = dataset.read(["clip_id", "audio"]).to_pylist()
    return {row["clip_id"]: decode_flac(row["audio"]) for row in table}


def pictures(dataset: Dataset) -> dict[str, np.ndarray]:
    table = dataset.read(["clip_id", "frames"]).to_pylist()
    return {row["clip_id"]: decode_frames(row["frames"]) for row in table}


def test_fault_01_a_cut_file_of_any_container_is_truncated_or_whole_where_it_is_looked_at(clips: Path) -> None:
    for seed in CUT:
        content = write_seed(clips / seed.name, seed).read_bytes()
        stem, suffix = seed.name.rsplit(".", 1)
        (clips / seed.name).rename(clips / f"{stem}-{suffix}-whole.mp4")
        for share in (1, 50, 99):
            (clips / f"{stem}-{suffix}-{share}.mp4").write_bytes(content[: len(content) * share // 100])
        if suffix == "mp4":
            (clips / f"{stem}-{suffix}-bytes.mp4").write_bytes(content[:406])
    dataset = made(clips)
    told, shown = outcomes(dataset), pictures(dataset)
    assert len(told) == 4 * len(CUT) + sum(seed.name.endswith(".mp4") for seed in CUT)
    for clip, outcome in told.items():
        name, _, cut = clip.rpartition("-")
        if cut == "whole":
            assert outcome == "row", clip
        elif cut in ("1", "bytes"):
            assert outcome == "truncated", clip
        elif outcome == "row":
            # Only where the window ends before the cut, or within the share that may be padded.
            assert cut == "99" or name.split("-")[0].endswith("_long"), clip
            np.testing.assert_array_equal(shown[clip][:38], shown[f"{name}-whole"][:38])
        else:
            # An ogg file does not say how long it should be.
            assert outcome in (("truncated", "too_short") if name.endswith("ogg") else ("truncated",)), clip
    assert sum(outcome == "row" for outcome in told.values()) < 2 * len(CUT)


def test_fault_02_a_film_without_sound_is_no_audio_in_training_and_welcome_in_generation(clips: Path) -> None:
    film = write_clip(clips / "film.mp4", grey_frames([60] * 63), None)
    write_seed(clips / "good.mp4", SEEDS[0])
    assert outcomes(made(clips)) == {"film": "no_audio", "good": "row"}
    policy = write_untrained_policy(clips.parent / "policy")
    out = clips.parent / "out.mp4"
    words = ("--policy", str(policy), "--video", str(film), "--out", str(out), "--num-steps", "1", "--guidance", "1")
    assert main(cli.parse("generate", Options, words)) == 0
    assert out.stat().st_size > 0


def test_fault_03_sound_alone_a_sleeve_and_a_still_image_are_no_video(clips: Path) -> None:
    write_clip(clips / "radio.mp4", None, tone(2.6, 48_000))
    write_cover_art(clips / "sleeve.mp4")
    for kind in ("PNG", "JPEG"):
        Image.new("RGB", (64, 64), "red").save(clips / f"{kind}.mp4", kind)
    assert outcomes(made(clips)) == dict.fromkeys(("radio", "sleeve", "PNG", "JPEG"), "no_video")


def test_fault_04_no_bytes_no_frames_and_no_time_are_empty(clips: Path) -> None:
    (clips / "zero.mp4").write_bytes(b"")
    write_no_frames(clips / "tracks.mp4")
    write_no_frames(clips / "chunks.avi")
    assert outcomes(made(clips)) == dict.fromkeys(("zero", "tracks", "chunks"), "empty")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_fault_05_flash_and_beep_meet_in_the_row_of_a_late_and_uneven_film(clips: Path, suffix: str) -> None:
    # The flash comes at 1.0 s; frames before it are unevenly spaced, and the header's 50 fps are a lie.
    times = [0.0, 0.03, 0.4, 0.45, 0.9, 1.0, *(1.0 + i / 20 for i in range(1, 33))]
    levels = [20 if time_s < 1.0 else 230 for time_s in times]
    write_clip(
        clips / f"late.{suffix}",
        grey_frames(levels, 64, 64),
        beep(2.6, 48_000, 1.0),
        frame_times_s=times,
        frame_rate=50,
        b_frames=2,
        offset_s=0.7,
    )
    dataset = made(clips)
    assert outcomes(dataset) == {"late": "row"}
    brightness = pictures(dataset)["late"].mean(axis=(1, 2, 3))
    onset_s = float(np.argmax(np.abs(sounds(dataset)["late"]) > 0.1)) / TINY.sample_rate_hz
    flash = int(np.argmax(brightness > 128))
    # A frame is shown from its time on: the flash lies in the sixteenth of a second that ends with this frame.
    assert (flash - 1) / TINY.frames_rate_hz - 0.02 < onset_s < flash / TINY.frames_rate_hz + 0.02
    assert flash in (16, 17)
    assert (brightness[:flash] < 60).all()
    assert (brightness[flash:] > 180).all()


def test_fault_06_three_hours_become_windows_within_a_bound_of_memory(clips: Path) -> None:
    write_hours(clips / "hours.mkv", 3)
    calls: list[Call] = []
    made(clips)  # What a first run loads does not count.
    restart_peak(torch.device("cpu"))
    before = peak_memory(torch.device("cpu")).process_bytes
    with watched(calls.append):
        dataset = made(clips, windows="all", hop_s=1777.0, out="windows")
    assert outcomes(dataset) == {f"hours#{k * 1_777_000}": "row" for k in range(7)}
    for clip, shown in pictures(dataset).items():
        hour = int(clip.partition("#")[2]) // 3_600_000
        assert abs(float(shown.mean()) - (40 + 60 * hour)) < 5, clip
    assert peak_memory(torch.device("cpu")).process_bytes - before < 200 * MIB
    assert max(call.child_peak_bytes for call in calls) < 300 * MIB


def test_fault_07_any_layout_rate_and_depth_becomes_a_row_and_what_is_not_what_it_says_is_refused(clips: Path) -> None:
    heard = {
        "mono": Seed(name="mono.mp4", video="mpeg4", audio="aac"),
        "five_one": Seed(name="five_one.mp4", video="mpeg4", audio="aac", layout="5.1"),
        "seven_one": Seed(name="seven_one.mkv", video="mpeg4", audio="flac", layout="7.1"),
        "slow": Seed(name="slow.mov", video="mpeg4", audio="pcm_s16le", rate_hz=8000),
        "fast": Seed(name="fast.mkv", video="mpeg4", audio="flac", rate_hz=192_000),
        "deep": Seed(name="deep.mov", video="mpeg4", audio="pcm_s24le"),
        "surround": Seed(name="surround.mkv", video="mpeg4", audio="ac3", layout="5.1"),
    }
    for seed in heard.values():
        write_seed(clips / seed.name, seed)
    write_seed(clips / "wavpack.mkv", Seed(name="wavpack.mkv", video="mpeg4", audio="wavpack"))
    # PyAV's wheel reads DTS and cannot write it: another codec's packets under its name.
    patched(clips / "dts.mkv", (clips / "surround.mkv").read_bytes(), b"A_AC3", b"A_DTS")
    dataset = made(clips)
    assert outcomes(dataset) == {**dict.fromkeys(heard, "row"), "wavpack": "unsupported_codec", "dts": "truncated"}
    for clip, wave in sounds(dataset).items():
        assert len(wave) == TINY.num_samples
        # The seeds' tone; its tremolo makes side lines 3 Hz away.
        assert frequency_of(wave, TINY.sample_rate_hz) == pytest.approx(300 + 20 * len(heard[clip].name), abs=1), clip
        assert 0.15 < np.abs(wave).max() < 0.95, clip


@pytest.mark.filterwarnings("error")
def test_fault_08_silence_a_constant_and_full_scale_are_told_before_anything_is_divided(clips: Path) -> None:
    square = np.sign(tone(2.6, 16_000)).astype(np.float32)
    waves = {
        "nothing": np.zeros((1, 41_600), np.float32),
        "whisper": tone(2.6, 16_000, amplitude=2e-5),
        "constant": np.full((1, 41_600), 0.5, np.float32),
        "square": square,
        "quiet": tone(2.6, 16_000, amplitude=0.01),
    }
    for name, wave in waves.items():
        path = clips / f"{name}.mov"
        write_clip(path, grey_frames([60] * 65), wave, rate_hz=16_000, audio_codec="pcm_f32le")
    found = outcomes(made(clips))
    assert found == {
        "nothing": "silent",
        "whisper": "silent",
        "constant": "silent",
        "square": "clipped",
        "quiet": "row",
    }


def test_fault_09_what_is_no_media_is_refused_whatever_its_name_and_bombs_stay_small(clips: Path) -> None:
    rng = np.random.default_rng(9)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("clip.mp4", bytes(1 << 20))
    header = bytearray(write_seed(clips / "good.mp4", SEEDS[0]).read_bytes())
    header[:64] = rng.bytes(64)
    refused = {
        "noise.mp4": rng.bytes(20_000),
        "text.mp4": b"this was a text file\n" * 400,
        "list.mp4": b"#EXTM3U\n#EXTINF:5,\nfile:///etc/passwd\n",
        "zip.mp4": packed.getvalue(),
        "gzip.mp4": gzip.compress(bytes(256 << 20), 1),
        "header.mp4": bytes(header),
    }
    bomb = compressed_header_bomb(64 * MIB)
    bombs = {"bomb.mov": bomb, "liar.mov": bomb.replace((64 * MIB).to_bytes(4, "big"), b"\xff\xff\xff\xf0")}
    for name, content in (refused | bombs).items():
        (clips / name).write_bytes(content)
    calls: list[Call] = []
    with watched(calls.append):
        found = outcomes(made(clips))
    assert found.pop("good") == "row"
    assert {found.pop("bomb"), found.pop("liar")} <= {"not_media", "empty", "truncated", "too_large"}
    assert found == {Path(name).stem: "not_media" for name in refused}
    assert max(call.child_peak_bytes for call in calls) < 300 * MIB


def test_fault_10_declared_sizes_beyond_the_budget_are_too_large_before_they_are_decoded(clips: Path) -> None:
    small = write_clip(clips / "small.mp4", grey_frames([60] * 65, 64, 64), tone(2.6, 16_000), rate_hz=16_000)
    huge_h264(small, clips / "wide.mp4", 16_384, 16_384)
    huge_h264(small, clips / "vast.mkv", 65_536, 65_536)
    vp8 = write_seed(clips / "vp8.webm", Seed(name="vp8.webm", video="libvpx", audio="libopus"))
    resized_vp8(vp8, clips / "vp8_vast.webm", 16_383, 16_383)
    write_clip(clips / "whole.mp4", grey_frames([60] * 3, 2200, 4400), tone(2.6, 16_000), rate_hz=16_000)
    calls: list[Call] = []
    with watched(calls.append):
        found = outcomes(made(clips))
    assert found == {"small": "row", "vp8": "row", **dict.fromkeys(("wide", "vast", "vp8_vast", "whole"), "too_large")}
    # One picture of 16384 x 16384 would take 400 MB.
    assert max(call.child_peak_bytes for call in calls) < 300 * MIB


def test_fault_10_tiny_odd_turned_deep_and_transparent_pictures_become_rows_of_their_own_colours(clips: Path) -> None:
    left, right = 40, 200
    picture = np.full((48, 64, 3), left, np.uint8)
    picture[:, 32:] = right
    for name, options in {
        "odd.mkv": {"video_codec": "libvpx-vp9", "audio_codec": "libopus"},
        "turned.mp4": {"rotation": 90},
        "deep.mov": {"video_codec": "libx265", "pixel_format": "yuv420p10le", "audio_codec": "pcm_s16le"},
        "clear.webm": {"video_codec": "libvpx-vp9", "audio_codec": "libopus", "pixel_format": "yuva420p"},
    }.items():
        shown = picture[:47, :63] if name == "odd.mkv" else picture
        write_clip(clips / name, [shown] * 65, tone(2.6, 48_000), **options)  # pyright: ignore[reportArgumentType]
    point = {"video_codec": "libvpx-vp9", "audio_codec": "libopus"}
    write_clip(clips / "point.mkv", grey_frames([120] * 65, 1, 1), tone(2.6, 48_000), **point)  # pyright: ignore[reportArgumentType]
    dataset = made(clips)
    assert outcomes(dataset) == dict.fromkeys(("odd", "turned", "deep", "clear", "point"), "row")
    for clip, shown in pictures(dataset).items():
        grey = shown[20].astype(float).mean(axis=2)
        if clip == "point":
            assert np.abs(grey - 120).max() < 8
        elif clip == "turned":
            # A quarter turn counter-clockwise: what was at the right is above.
            assert abs(grey[:24].mean() - right) < 10
            assert abs(grey[40:].mean() - left) < 10
        else:
            assert abs(grey[:, :24].mean() - left) < 10, clip
            assert abs(grey[:, 40:].mean() - right) < 10, clip


@pytest.mark.parametrize(
    ("suffix", "codec", "share"),
    [("mp4", "libx264", 0.5), ("mkv", "libx264", 0.5), ("mkv", "mpeg4", 0.6), ("avi", "mpeg4", 0.45)],
)
def test_fault_11_windows_beside_the_damage_keep_their_times_and_those_in_it_are_rejected(
    clips: Path, suffix: str, codec: str, share: float
) -> None:
    whole = write_numbered(clips / f"whole.{suffix}", 25, video_codec=codec)
    (clips / f"film.{suffix}").write_bytes(whole.read_bytes())
    overwrite(clips / f"film.{suffix}", [share], 800)
    dataset = made(clips, windows="all", hop_s=2.5)
    told, shown, heard = outcomes(dataset), pictures(dataset), sounds(dataset)
    starts_ms = range(0, 25_000, 2500)
    assert set(told) == {f"{name}#{start_ms}" for name in ("film", "whole") for start_ms in starts_ms}
    assert all(told[f"whole#{start_ms}"] == "row" for start_ms in starts_ms)
    lost = {start_ms for start_ms in starts_ms if told[f"film#{start_ms}"] != "row"}
    assert {told[f"film#{start_ms}"] for start_ms in lost} == {"truncated"}
    # The share of the bytes is the share of the time, give or take a window.
    assert lost <= {start_ms for start_ms in starts_ms if abs(start_ms + 1250 - 25_000 * share) < 3750}
    for start_ms in set(starts_ms) - lost:
        due = [number_of(picture) for picture in shown[f"whole#{start_ms}"]]
        found = [number_of(picture) for picture in shown[f"film#{start_ms}"]]
        if suffix == "mkv":
            # Matroska loses damaged blocks without a word, and uneven frame rates are lawful: a picture stays longer.
            held = [i for i in range(len(due)) if found[i] != due[i] and found[i] < due[i]]
            assert len(held) <= 0.05 * len(due), start_ms
            found = [due[i] if i in held else number for i, number in enumerate(found)]
        assert found == due, start_ms
        pitches = [frequency_of(heard[f"{name}#{start_ms}"][8000:15_000], 16_000) for name in ("film", "whole")]
        assert pitches[0] == pytest.approx(pitches[1], abs=5)


def test_faults_below_the_threshold_end_well_and_above_it_the_finished_dataset_is_refused(clips: Path) -> None:
    for seed in (s for s in CUT[:6]):
        write_seed(clips / seed.name, seed)
    (clips / "zero.mp4").write_bytes(b"")
    assert made(clips, max_reject_rate=0.15).num_rows() == 6
    with pytest.raises(Refused, match="1 of 7 clips were rejected \\(1 empty\\)"):
        made(clips, max_reject_rate=0.1)
