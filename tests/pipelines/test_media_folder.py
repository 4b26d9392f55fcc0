"""Folders of videos: what is taken, under which names, on disk and on an object store."""

import os
from pathlib import Path

import pytest

from pipelines.data.media_folder import list_files, list_videos
from pipelines.data.plan import plan_rows, plan_windows
from pipelines.data.source import SourceReader
from pipelines.data.storage import open_folder
from pipelines.errors import InputError
from tests.pipelines.tar_factory import write_tar
from tests.storage_servers import s3, s3_address

__all__ = ["s3", "s3_address"]


def test_a_folder_gives_its_media_files_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.MP4", "a.mkv", "z/a.webm", "note.txt", "sound.wav", ".hidden.mp4", "m.mp4/inner.mov"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    rows = list_videos(str(tmp_path), default_split="val").rows()
    assert [r["video"] for r in rows] == [".hidden.mp4", "a.mkv", "b.MP4", "m.mp4/inner.mov", "z/a.webm"]
    assert all(r["uri"] == f"{tmp_path}/{r['video']}" and r["split"] == "val" and not r["line"] for r in rows)


def test_a_folder_without_media_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    for location in (tmp_path, tmp_path / "absent", tmp_path / "absent.tar", tmp_path / "x.tar"):
        with pytest.raises(InputError):
            list_videos(str(location))


def test_a_compressed_tar_is_wrong_input_unless_it_lies_beside_loose_files(tmp_path: Path) -> None:
    (tmp_path / "shard.tar.gz").write_bytes(b"\x1f\x8b")
    for location in (tmp_path, tmp_path / "shard.tar.gz"):
        with pytest.raises(InputError, match=r"shard\.tar\.gz is compressed"):
            list_videos(str(location))
    (tmp_path / "a.mp4").write_bytes(b"x")
    assert len(list_videos(str(tmp_path)).rows()) == 1
    write_tar(tmp_path / "other.tar", {"b.mp4": b"x"})
    with pytest.raises(InputError, match=r"shard\.tar\.gz is compressed"):
        list_videos(str(tmp_path))


def test_a_folder_of_tars_and_loose_files_gives_both(tmp_path: Path) -> None:
    write_tar(tmp_path / "sub" / "s.tar", {"b.mp4": b"x"})
    (tmp_path / "a.mp4").write_bytes(b"x")
    assert [r["video"] for r in list_videos(str(tmp_path)).rows()] == ["a.mp4", "sub/s.tar!/b.mp4"]


def test_keys_with_odd_characters_come_from_an_object_store_as_they_are(s3: str) -> None:
    names = ["a b.mp4", "sub/100%20.mkv", "é#1?.mp4"]
    for name in [*names, "x.txt"]:
        open_folder(s3).write_bytes(f"videos/{name}", name.encode())
    uri = f"{s3}/videos"
    assert [file.name for file in list_files(uri, {".mp4", ".mkv"})] == names
    plan = plan_windows(list_videos(uri), clip_s=2.5)
    assert plan["clip_id"].to_pylist() == ["100%20", "a b", "é#1?"]
    for row in plan_rows(plan, 0, 3):
        with SourceReader().open(row["uri"]) as media:
            assert media.path.read_text() == row["source"].removeprefix(f"{uri}/")
    with pytest.raises(InputError, match="names no media file"):
        list_videos(f"{s3}/nothing")
    with pytest.raises(InputError, match="NoSuchBucket"):
        list_videos("s3://no-such-bucket/videos")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "closed").mkdir(mode=0o000)
    with pytest.raises(InputError, match="closed/ cannot be listed"):
        list_videos(str(tmp_path))
