"""A list and a folder: every clip is found under the names its file may have, or is missing, and none is mixed up."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.data.entries import Entries
from pipelines.data.ingest import read_entries
from pipelines.data.plan import plan_windows
from pipelines.data.storage import open_folder
from pipelines.errors import InputError
from tests.pipelines.list_factory import LISTS
from tests.storage_servers import s3, s3_address

__all__ = ["s3", "s3_address"]


def listed(folder: Path, content: str, *files: str, **options: Any) -> Entries:
    for name in files:
        path = folder / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (folder / "list.csv").write_text(content)
    return read_entries(str(folder / "list.csv"), videos=str(folder / "videos"), **options)


def test_a_start_names_the_file_and_is_never_used_to_seek(tmp_path: Path) -> None:
    files = ("sub/---g-f_I2yQ_000001.webm", "-_a_b_c_d_e_000130.mp4")
    for kind in ("VGGSound csv", "VGGSound test csv", "MMAudio tsv", "list of ids"):
        rows = listed(tmp_path, LISTS[kind], *files, default_split="val").rows()
        assert [r["video"] for r in rows] == list(files)
        assert [r["start_s"] for r in rows] == [0.0, 0.0]
        assert [r["duration_s"] for r in rows] == [None, None]
        assert [r["split"] for r in rows] == (["test", "train"] if kind == "VGGSound csv" else ["val", "val"])


def test_starts_without_zeros_and_every_suffix_are_found(tmp_path: Path) -> None:
    text = "abcdefghijk,5,x,train\nabcdefghij_,60,y,train\n_bcdefghijk,70,z,test\n"
    rows = listed(tmp_path, text, "abcdefghijk_5.mkv", "abcdefghij__0060.MP4", "_bcdefghijk_000070.webm").rows()
    assert [(r["video"], r["caption"], r["reason"]) for r in rows] == [
        ("abcdefghijk_5.mkv", "x", None),
        ("abcdefghij__0060.MP4", "y", None),
        ("_bcdefghijk_000070.webm", "z", None),
    ]


def test_a_sound_of_the_same_stem_is_taken_with_the_picture(tmp_path: Path) -> None:
    files = ("a/x.mp4", "a/x.wav", "b/x.flac", "b/y.mp4", "b/y.FLAC", "b/y.wav", "z.wav")
    x, y, z = listed(tmp_path, "x\ny\nz\n", *files).rows()
    assert x["sound_uri"] == f"{tmp_path}/videos/a/x.wav"
    assert y["sound_uri"] == f"{tmp_path}/videos/b/y.FLAC"
    assert z["reason"] == "missing"


def test_clips_that_are_not_there_are_rows_with_their_keys_and_none_there_is_an_error(tmp_path: Path) -> None:
    entries = listed(tmp_path, "here\ngone.mp4\nlost\n", "here.mp4")
    assert entries.num_missing == 2
    assert entries.missing_names() == ["gone.mp4", "lost.mp4"]
    plan = plan_windows(entries, clip_s=2.5)
    assert dict(zip(plan["clip_id"].to_pylist(), plan["reason"].to_pylist(), strict=True)) == {
        "here": None,
        "gone": "missing",
        "lost": "missing",
    }
    with pytest.raises(InputError, match=r"none of its 2 clips lies under .*, one\.mp4, two\.mp4 among them"):
        listed(tmp_path, "one\ntwo\n")


def test_of_several_captions_of_a_clip_the_first_stays(tmp_path: Path) -> None:
    for name in ("-_a_b_c_d_e_000030.mp4", "-_a_b_c_d_e.mp4"):
        (tmp_path / name).mkdir()
        entries = listed(tmp_path / name, LISTS["AudioCaps csv"], name)
        assert [r["caption"] for r in entries.rows()] == ["A man talks, then laughs"]
        assert entries.num_repeated == 1


def test_two_files_of_one_stem_reject_the_clip_and_name_both(tmp_path: Path) -> None:
    a, b = listed(tmp_path, "a\nb\n", "a.mp4", "sub/a.mkv", "b.mp4").rows()
    assert (a["reason"], b["reason"]) == ("bad_uri", None)
    assert "'a.mp4' and 'sub/a.mkv'" in a["detail"]


def test_what_a_link_beside_a_video_leads_to_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(b"x")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.wav").symlink_to(tmp_path / "secret.wav")
    a, _ = listed(tmp_path, "a\nb\n", "a.mp4", "b.mp4").rows()
    assert (a["reason"], "a.wav" in a["detail"]) == ("bad_uri", True)
    a, _ = listed(tmp_path, "a\nb\n", "b.mp4", follow=True).rows()
    assert (a["reason"], a["sound_uri"]) == (None, f"{tmp_path}/videos/a.wav")


def test_list_and_folder_may_lie_on_an_object_store(s3: str) -> None:
    folder = open_folder(s3)
    folder.write_bytes("lists/vggsound.csv", LISTS["VGGSound csv"].encode())
    folder.write_bytes("videos/---g-f_I2yQ_000001.mp4", b"x")
    found, gone = read_entries(f"{s3}/lists/vggsound.csv", videos=f"{s3}/videos").rows()
    assert found["uri"] == f"{s3}/videos/---g-f_I2yQ_000001.mp4"
    assert (found["split"], gone["reason"]) == ("test", "missing")


def test_a_list_needs_its_folder_and_a_manifest_of_ours_none(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"list of ids .*; say with --videos"):
        read_entries(str(tmp_path / "ids.txt"))
    with pytest.raises(InputError, match="leave --videos"):
        listed(tmp_path, "video\na.mp4\n", "a.mp4")
