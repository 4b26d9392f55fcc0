"""Hostile manifests, folders and tars: each becomes rows and rejects with reasons, or one line that says where."""

import csv
import os
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.entries import Entries
from pipelines.data.ingest import read_entries
from pipelines.data.media_folder import list_videos
from pipelines.data.names import resolve
from pipelines.data.plan import plan_rows, plan_windows
from pipelines.data.preprocess import preprocess
from pipelines.data.preprocess_settings import PreprocessSettings
from pipelines.data.units import HERE
from pipelines.errors import InputError
from tests.pipelines.clip_factory import simple_clip
from tests.pipelines.tar_factory import add_member, write_tar

ODD_NAMES = (
    unicodedata.normalize("NFD", "Äpfel.mp4"),
    "😀🎬.mp4",
    "\u202eשלם\u202c.mp4",
    "a  b.mp4",
    "two\nlines.mp4",
    "quote\"and'.mp4",
    "comma,tab\t.mp4",
    "-rf.mp4",
    "n" * 251 + ".mp4",
    os.fsdecode(b"bytes\xff\xfe.mp4"),
)


def plan_of(entries: Entries) -> list[dict]:
    plan = plan_windows(entries, clip_s=2.5)
    return list(plan_rows(plan, 0, len(plan)))


def test_fault_12_odd_names_in_a_folder_and_in_a_manifest_are_the_same_rows_under_printable_keys(
    tmp_path: Path,
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    simple_clip(tmp_path / "clip.mp4")
    for name in ODD_NAMES:
        os.link(tmp_path / "clip.mp4", videos / name)
    with (videos / "clips.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([["video"], *([name] for name in ODD_NAMES)])
    pq.write_table(pa.table({"video": [os.fsencode(name) for name in ODD_NAMES]}), videos / "clips.parquet")
    found = plan_of(list_videos(str(videos)))
    assert {row["uri"].rpartition("/")[2] for row in found} == set(ODD_NAMES)
    assert all(row["clip_id"].isprintable() and row["source"].isprintable() for row in found)
    assert {"Äpfel", "😀🎬", "bytes%FF%FE", "two%0Alines"} < {row["clip_id"] for row in found}
    for name in ("clips.csv", "clips.parquet"):
        assert plan_of(read_entries(str(videos / name))) == found
    # Every one of them is opened and decoded under its own name.
    settings = PreprocessSettings(spec="tiny", encoders="grids")
    dataset = preprocess(list_videos(str(videos)), settings, out=str(tmp_path / "out"), pool=HERE)
    assert dataset.read(["clip_id"])["clip_id"].to_pylist() == sorted(row["clip_id"] for row in found)


def test_fault_12_twins_that_differ_in_normal_form_alone_are_named_and_not_mixed_up(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        (tmp_path / unicodedata.normalize(form, "é.mp4")).write_bytes(b"x")
    with pytest.raises(InputError, match="two entries give the key 'é'"):
        plan_of(list_videos(str(tmp_path)))


def test_fault_13_repeats_are_counted_and_other_rows_of_one_key_are_named_with_both_lines(tmp_path: Path) -> None:
    def read(text: str) -> Entries:
        (tmp_path / "clips.csv").write_text(text)
        return read_entries(str(tmp_path / "clips.csv"))

    entries = read("video,start_s\na.mp4,0\nb.mp4,1\n./a.mp4,\na.mp4,0.0\nx/../b.mp4,1.000\n")
    assert [(row["clip_id"], row["start_s"]) for row in plan_of(entries)] == [("a", 0.0), ("b", 1.0)]
    assert entries.num_repeated == 3
    for text in (
        "video\nx/a.mp4\nc.mp4\ny/a.mp4\n",
        "video\na.mp4\nc.mp4\na.mkv\n",
        "video\né.mp4\nc.mp4\ne\u0301.mp4\n",
        "video,start_s\na.mp4,1.0001\nc.mp4,\na.mp4,1.0002\n",
        "video,split\nx/a.mp4,train\nc.mp4,train\ny/a.mp4,test\n",
    ):
        with pytest.raises(InputError, match=r"line 2 .* line 4 ") as caught:
            plan_of(read(text))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "video",
    [
        "/etc/passwd",
        "../secret.mp4",
        "a/../../secret.mp4",
        "..",
        ".",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "http://169.254.169.254/latest/meta-data",
        "https://example.org/a.mp4",
        "gs://bucket/a.mp4",
        "concat:a.mp4|b.mp4",
        "subfile,,start,0,end,9,,:/etc/passwd",
        "data:video/mp4;base64,AAAA",
        "pipe:0",
        "a\0b.mp4",
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "s3:///etc/passwd",
        "s3://key:secret@bucket/a.mp4",
        "s3://169.254.169.254:80/a.mp4",
        "s3://bucket/a\0.mp4",
        "s3://bucket/" + "k" * 1025,
        "s3://bucket/" + os.fsdecode(b"\xff.mp4"),
        "S3://bucket/a.mp4",
    ],
)
def test_fault_14_what_could_name_anything_but_a_file_of_the_manifest_is_never_opened(
    tmp_path: Path, video: str
) -> None:
    uri, problem = resolve(video, "/data")
    assert problem is not None
    assert (uri, problem[0]) == (video, "bad_uri")
    with (tmp_path / "clips.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([["video"], [video]])
    (row,) = plan_of(read_entries(str(tmp_path / "clips.csv")))
    assert row["reason"] == "bad_uri"
    assert row["clip_id"]


def test_fault_15_links_pipes_and_devices_in_a_folder_are_rejects_and_nothing_hangs(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "deep" / "er").mkdir(parents=True)
    outside.mkdir()
    for path in (root / "b.mp4", root / "deep" / "er" / "a.MKV", root / "note.txt", outside / "secret.mp4"):
        path.write_bytes(b"x")
    (root / "link.mp4").symlink_to(outside / "secret.mp4")
    (root / "inner.mp4").symlink_to("b.mp4")
    (root / "gone.mp4").symlink_to("nowhere.mp4")
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "null.mp4").symlink_to("/dev/zero")
    (root / "deep" / "up").symlink_to(root)
    (root / "away").symlink_to(outside)
    os.mkfifo(root / "pipe.mp4")
    os.mkfifo(root / "pipe.tar")
    (root / "shard.tar").symlink_to("/dev/zero")
    found = {row["video"]: row["reason"] for row in list_videos(str(root)).rows()}
    assert found == {
        "b.mp4": None,
        "inner.mp4": None,
        "deep/er/a.MKV": None,
        "link.mp4": "bad_uri",
        "gone.mp4": "missing",
        "loop.mp4": "missing",
        "null.mp4": "not_media",
        "pipe.mp4": "not_media",
        "pipe.tar!/rest-of-pipe.tar": "not_media",
        "shard.tar!/rest-of-shard.tar": "not_media",
    }
    followed = {row["video"]: row["reason"] for row in list_videos(str(root), follow=True).rows()}
    assert followed["link.mp4"] is None
    assert followed["away/secret.mp4"] is None
    assert len(followed) == len(found) + 1
    for location in (root / "pipe.mp4", root / "pipe.tar"):
        with pytest.raises(InputError):
            read_entries(str(location))
        with pytest.raises(InputError):
            list_videos(str(location))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_fault_16_byte_order_marks_and_line_ends_do_not_matter(tmp_path: Path, newline: str, mark: bytes) -> None:
    text = newline.join(["video\tcaption", "a.mp4\tdog", "", "b.mp4\t", ""])
    (tmp_path / "clips.tsv").write_bytes(mark + text.encode())
    entries = read_entries(str(tmp_path / "clips.tsv"))
    assert [(r["line"], r["video"], r["caption"], r["split"], r["events"]) for r in entries.rows()] == [
        (2, "a.mp4", "dog", "train", None),
        (4, "b.mp4", "", "train", None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,caption\na.mp4,x\nb.mp4\n", "line 3: 1 fields, the header has 2"),
        ("video,caption\na.mp4,x,y\n", "line 2: 3 fields"),
        ('video,caption\n"a\n\n.mp4",x\nb.mp4\n', "line 5: 1 fields"),
        ("caption,split\nx,train\n", "line 1: no column 'video' among: caption, split"),
        ('video\na.mp4\n"' + "x" * 200_000, "line 3: field larger than field limit"),
    ],
)
def test_fault_16_a_ragged_row_and_a_missing_column_are_named_with_their_line(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "clips.csv").write_text(text)
    with pytest.raises(InputError) as caught:
        read_entries(str(tmp_path / "clips.csv"))
    assert message in str(caught.value)


def test_fault_16_captions_that_are_nan_null_or_of_100_kb(tmp_path: Path) -> None:
    long = "woof é " * 14_000
    assert len(long.encode()) > 100_000
    frame = {"video": ["a.mp4", "b.mp4"], "caption": [float("nan"), None]}
    pq.write_table(
        pa.table({**frame, "caption": pa.array(frame["caption"], from_pandas=False)}), tmp_path / "f.parquet"
    )
    pq.write_table(pa.table({"video": ["a.mp4"], "caption": [long]}), tmp_path / "l.parquet")
    (tmp_path / "l.csv").write_text(f"video,caption\na.mp4,{long}\nb.mp4,\nc.mp4,nan\n")
    assert [r["caption"] for r in read_entries(str(tmp_path / "f.parquet")).rows()] == ["", ""]
    assert [r["caption"] for r in read_entries(str(tmp_path / "l.parquet")).rows()] == [long]
    # In a csv `nan` is what was written there: a word.
    rows = plan_of(read_entries(str(tmp_path / "l.csv")))
    assert [r["caption"] for r in rows] == [long, "", "nan"]


MEASURE = """
import pathlib, sys
from pipelines.data.ingest import read_entries
from pipelines.data.plan import plan_windows
def peak(path):
    entries = read_entries(path)
    entries.fingerprint
    assert len(plan_windows(entries, clip_s=2.5)) == entries.table.num_rows
    # Not getrusage: its peak holds that of the parent from before the exec.
    return next(int(x.split()[1]) * 1024 for x in pathlib.Path("/proc/self/status").open() if x.startswith("VmHWM"))
print(peak(sys.argv[1]), peak(sys.argv[2]))
"""


def test_fault_16_a_long_manifest_is_streamed_into_columns(tmp_path: Path) -> None:
    """10^7 rows at this cost a row are some 7 GB; as objects of Python they would be more than 20."""
    small, large = 20_000, 120_000
    for rows in (small, large):
        with (tmp_path / f"{rows}.csv").open("w") as file:
            file.write("video,start_s,caption,split\n")
            file.writelines(f"videos/v{i:08d}.mp4,1.5,a dog barks {i},train\n" for i in range(rows))
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / f"{rows}.csv") for rows in (small, large))]
    first, second = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert (second - first) / (large - small) < 1500


def hostile_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        add_member(tar, "b.txt", b"before its video")
        add_member(tar, "/etc/absolute.mp4", b"x")
        add_member(tar, "../../escape.mp4", b"x")
        add_member(tar, "twice.mp4", b"first")
        add_member(tar, "b.mp4", b"the video")
        add_member(tar, "twice.mp4", b"second")
        add_member(tar, "hard.mp4", type=tarfile.LNKTYPE, linkname="b.mp4")
        add_member(tar, "soft.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add_member(tar, "pipe.mp4", type=tarfile.FIFOTYPE)
        add_member(tar, "zero.mp4", type=tarfile.CHRTYPE)
        add_member(tar, "folder.mp4", type=tarfile.DIRTYPE)
        add_member(tar, "c.mp4", b"its caption is there twice")
        add_member(tar, "c.txt", b"one")
        add_member(tar, "c.txt", b"two")
        add_member(tar, "d.mp4", b"its caption is a link")
        add_member(tar, "d.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")


def test_fault_17_members_of_a_tar_are_grouped_or_rejected_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    hostile_tar(tmp_path / "in" / "s.tar")
    before = sorted(tmp_path.rglob("*"))
    rows = {row["member"]: row for row in list_videos(str(tmp_path / "in")).rows()}
    assert {name: row["reason"] for name, row in rows.items()} == {
        "b.mp4": None,
        "/etc/absolute.mp4": "bad_uri",
        "../../escape.mp4": "bad_uri",
        "twice.mp4": "bad_uri",
        "hard.mp4": "bad_uri",
        "soft.mp4": "bad_uri",
        "pipe.mp4": "not_media",
        "zero.mp4": "not_media",
        "c.mp4": "bad_uri",
        "d.mp4": "bad_uri",
    }
    assert rows["b.mp4"]["caption"] == "before its video"
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/etc/absolute.mp4").exists()


def test_fault_17_a_truncated_tar_gives_its_whole_members_and_one_reject(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "s.tar", {"a.mp4": b"1" * 3000, "b.mp4": b"2" * 3000, "b.txt": b"3" * 900})
    content = whole.read_bytes()
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 3
    cuts = {
        headers[1] - 30: {"a.mp4": None, "rest-of-s.tar": "truncated"},
        headers[1]: {"a.mp4": None, "rest-of-s.tar": "truncated"},
        headers[1] + 100: {"a.mp4": None, "rest-of-s.tar": "truncated"},
        headers[1] + 512: {"a.mp4": None, "b.mp4": "truncated"},
        headers[2] - 1000: {"a.mp4": None, "b.mp4": "truncated"},
        headers[2] + 600: {"a.mp4": None, "b.mp4": "truncated", "rest-of-s.tar": "truncated"},
        headers[0] + 600: {"a.mp4": "truncated"},
        headers[0] + 100: {"rest-of-s.tar": "not_media"},
        0: {"rest-of-s.tar": "empty"},
    }
    for cut, expected in cuts.items():
        whole.write_bytes(content[:cut])
        found = {row["member"]: row["reason"] for row in list_videos(str(whole)).rows()}
        assert found == expected, cut


def test_fault_17_a_file_that_is_no_tar_is_one_reject(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    write_tar(tmp_path / "t.tar", {"a.mp4": b"x"})
    reasons = [(row["video"], row["reason"]) for row in list_videos(str(tmp_path)).rows()]
    assert reasons == [("s.tar!/rest-of-s.tar", "not_media"), ("t.tar!/a.mp4", None)]
