"""Manifests and folders -> entries -> keyed windows; everything hostile in them is refused before it is opened."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.manifest import Entry, clip_key, list_videos, plan_windows, read_entries, resolve
from pipelines.errors import InputError


def manifest(folder: Path, content: str | bytes, name: str = "clips.csv") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def entry(video: str, line: int = 1, **fields: object) -> Entry:
    return Entry(line=line, video=video, uri=f"/data/{video}", **fields)  # pyright: ignore[reportArgumentType]


def keys(entries: list[Entry], clip_s: float = 2.5, **options: object) -> list[tuple[str, float]]:
    rows = plan_windows(entries, clip_s=clip_s, **options)  # pyright: ignore[reportArgumentType]
    return [(row.clip_id, row.start_s) for row in rows]


def test_a_csv_with_every_column_is_read(tmp_path: Path) -> None:
    events = json.dumps([{"time_s": 0.5, "duration_s": 0.1, "kind": "ball", "variant": "red"}])
    quoted = events.replace('"', '""')
    text = (
        f'video,start_s,duration_s,caption,split,events,label\na b/x.mp4,1.5,,"one, ""two""\nthree",val,"{quoted}",7\n'
    )
    (read,) = read_entries(manifest(tmp_path, text)).entries
    assert read.uri == f"{tmp_path}/a b/x.mp4"
    assert (read.start_s, read.duration_s, read.split, read.line) == (1.5, None, "val", 2)
    assert read.caption == 'one, "two"\nthree'
    assert read.events == ({"time_s": 0.5, "duration_s": 0.1, "kind": "ball", "variant": "red"},)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_and_line_ends_do_not_matter(tmp_path: Path, newline: str, mark: bytes) -> None:
    text = newline.join(["video\tcaption", "a.mp4\tdog", "", "b.mp4\t", ""])
    entries = read_entries(manifest(tmp_path, mark + text.encode(), "clips.tsv")).entries
    assert [(e.video, e.caption, e.split, e.events) for e in entries] == [
        ("a.mp4", "dog", "train", None),
        ("b.mp4", "", "train", None),
    ]


def test_parquet_with_nulls_and_nested_events_is_read(tmp_path: Path) -> None:
    event = {"time_s": 1.0, "duration_s": 0.2, "kind": "lamp", "variant": "cyan"}
    table = pa.table(
        {"video": ["a.mp4", "b.mp4"], "caption": [None, "x"], "start_s": [None, 2], "events": [[event], None]}
    )
    pq.write_table(table, tmp_path / "clips.parquet")
    first, second = read_entries(str(tmp_path / "clips.parquet")).entries
    assert (first.caption, first.start_s, first.events) == ("", 0.0, (event,))
    assert (second.caption, second.start_s, second.events) == ("x", 2.0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("video\n", "names no media file"),
        ("file,caption\na.mp4,x\n", "line 1: no column 'video'"),
        ("video,video\na,b\n", "line 1: a column name occurs twice"),
        ("video,caption\na.mp4,x\nb.mp4\n", "line 3: 1 fields, the header has 2"),
        ("video,caption\na.mp4,x,y\n", "line 2: 3 fields"),
        ('video,caption\na.mp4,"open\n\n\n', "line 2: unexpected end of data"),
        ("video\n\n  \n", "line 3: 'video' is empty"),
        ("video,start_s\na.mp4,soon\n", "line 2: start_s 'soon' is not a number"),
        ("video,start_s\na.mp4,nan\n", "line 2: start_s is nan"),
        ("video,start_s\na.mp4,-1\n", "line 2: start_s is -1"),
        ("video,duration_s\na.mp4,0\n", "line 2: duration_s is 0"),
        ("video,split\na.mp4,dev\n", "line 2: split 'dev' is not one of train, rpo, val, test"),
        ("video,events\na.mp4,[{]\n", "line 2: events must be"),
        ('video,events\na.mp4,"[{""time_s"": 1}]"\n', "line 2: events must be"),
        ('video,caption\n"a\n\n.mp4",x\nb.mp4\n', "line 5: 1 fields"),
    ],
)
def test_what_cannot_be_parsed_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_entries(manifest(tmp_path, text))
    assert message in str(caught.value)


def test_a_missing_manifest_and_a_foreign_kind_are_wrong_input(tmp_path: Path) -> None:
    for location in (str(tmp_path / "absent.csv"), str(tmp_path), manifest(tmp_path, "x", "clips.json")):
        with pytest.raises(InputError):
            read_entries(location)
    with pytest.raises(InputError, match="not a Parquet file"):
        read_entries(manifest(tmp_path, "video\na.mp4\n", "clips.parquet"))


@pytest.mark.parametrize(
    "video",
    [
        "/etc/passwd",
        "../secret.mp4",
        "a/../../secret.mp4",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "http://169.254.169.254/latest/meta-data",
        "https://example.org/a.mp4",
        "concat:a.mp4|b.mp4",
        "subfile,,start,0,end,9,,:/etc/passwd",
        "data:video/mp4;base64,AAAA",
        "pipe:0",
        "a\0b.mp4",
        "..",
    ],
)
def test_what_could_name_anything_but_a_file_of_the_manifest_is_a_bad_uri(video: str) -> None:
    uri, problem = resolve(video, "/data")
    assert problem is not None
    assert problem[0] == "bad_uri"
    assert uri == video


@pytest.mark.parametrize(
    "video", ["a.mp4", "./a: b.mp4", "sub/x.mp4", "-x.mp4", "a..b/c.mp4", "12:30.mp4", "日本/é.mp4"]
)
def test_ordinary_names_are_files_under_the_manifest(video: str) -> None:
    uri, problem = resolve(video, "/data")
    assert problem is None
    assert uri == f"/data/{video.removeprefix('./')}"


def test_objects_on_known_storage_are_opened_by_their_uri() -> None:
    assert resolve("s3://bucket/a.mp4", "/data") == ("s3://bucket/a.mp4", None)


@pytest.mark.parametrize(
    ("video", "key"),
    [
        ("dir/-2xQ_a_000030.mp4", "-2xQ_a_000030"),
        ("a b.c.mp4", "a b.c"),
        ("e\u0301.mp4", "é"),
        ("two\nlines.mp4", "two%0Alines"),
        ("tab\t\u200f.mp4", "tab%09%E2%80%8F"),
        (os.fsdecode(b"bytes\xff.mp4"), "bytes%FF"),
        ("😀.mp4", "😀"),
        ("s3://bucket/x/y.webm", "y"),
    ],
)
def test_the_key_is_the_stem_in_printable_form(video: str, key: str) -> None:
    assert clip_key(video) == key


@given(st.binary(min_size=1, max_size=40).filter(lambda b: b"/" not in b and b"\0" not in b))
def test_every_name_gives_a_printable_key_that_can_be_stored(name: bytes) -> None:
    key = clip_key(os.fsdecode(name) + ".mp4")
    assert key.isprintable()
    assert "/" not in key
    key.encode()


def test_one_window_has_the_bare_key_and_several_carry_their_start() -> None:
    assert keys([entry("a.mp4", start_s=3.0)]) == [("a", 3.0)]
    both = [entry("a.mp4", 2, start_s=0.0), entry("a.mp4", 3, start_s=12.3456), entry("b.mp4", 4)]
    assert keys(both) == [("a#0", 0.0), ("a#12346", 12.3456), ("b", 0.0)]


def test_all_whole_windows_are_taken() -> None:
    lengths = {"/data/a.mp4": 10.0, "/data/b.mp4": 2.0, "/data/c.mp4": 4.9995}

    def plan(video: str, hop_s: float | None = None, **fields: object) -> list[tuple[str, float]]:
        return keys([entry(video, **fields)], windows="all", hop_s=hop_s, length_of=lambda e: lengths.get(e.uri))

    assert plan("a.mp4") == [("a#0", 0.0), ("a#2500", 2.5), ("a#5000", 5.0), ("a#7500", 7.5)]
    assert plan("a.mp4", 5.0) == [("a#0", 0.0), ("a#5000", 5.0)]
    assert plan("a.mp4", start_s=1.0, duration_s=5.2) == [("a#1000", 1.0), ("a#3500", 3.5)]
    assert plan("c.mp4") == [("c#0", 0.0), ("c#2500", 2.5)]
    # A file too short for one, or of unknown length, still gives one row or one reject.
    assert plan("b.mp4") == [("b", 0.0)]
    assert plan("unknown.mp4") == [("unknown", 0.0)]


def test_a_part_shorter_than_a_clip_is_rejected_unopened() -> None:
    (row,) = plan_windows([entry("a.mp4", duration_s=2.0)], clip_s=2.5)
    assert row.entry.problem is not None
    assert row.entry.problem[0] == "too_short"
    (row,) = plan_windows([entry("a.mp4", duration_s=2.4)], clip_s=2.5)
    assert row.entry.problem is None


def test_exact_repeats_are_counted_and_other_repeats_named_with_both_lines(tmp_path: Path) -> None:
    entries = read_entries(manifest(tmp_path, "video,start_s\na.mp4,0\nb.mp4,1\n./a.mp4,\na.mp4,0.0\n"))
    assert [e.video for e in entries.entries] == ["a.mp4", "b.mp4"]
    assert entries.num_repeated == 2
    for text in (
        "video\nx/a.mp4\nc.mp4\ny/a.mp4\n",
        "video\na.mp4\nc.mp4\na.mkv\n",
        "video\né.mp4\nc.mp4\ne\u0301.mp4\n",
    ):
        with pytest.raises(InputError, match=r"line 2 .* line 4 ") as caught:
            plan_windows(read_entries(manifest(tmp_path, text)).entries, clip_s=2.5)
        assert "\n" not in str(caught.value)


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    text = "video,caption\na.mp4,x\nb.mp4,y\n"
    first = read_entries(manifest(tmp_path, text)).fingerprint
    assert read_entries(manifest(tmp_path / "other", text.replace(",", "\t"), "m.tsv")).fingerprint == first
    assert read_entries(manifest(tmp_path, "video,caption\nb.mp4,y\na.mp4,x\n")).fingerprint == first
    assert read_entries(manifest(tmp_path, text.replace("y", "z"))).fingerprint != first


def test_a_folder_gives_its_media_files_and_nothing_hangs(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "deep" / "er").mkdir(parents=True)
    outside.mkdir()
    for path in (root / "b.mp4", root / "deep" / "er" / "a.MKV", root / "note.txt", outside / "secret.mp4"):
        path.write_bytes(b"x")
    (root / "link.mp4").symlink_to(outside / "secret.mp4")
    (root / "inner.mp4").symlink_to("b.mp4")
    (root / "gone.mp4").symlink_to("nowhere.mp4")
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "deep" / "up").symlink_to(root)
    (root / "away").symlink_to(outside)
    os.mkfifo(root / "pipe.mp4")
    found = {e.video: e.problem and e.problem[0] for e in list_videos(str(root)).entries}
    assert found == {
        "b.mp4": None,
        "inner.mp4": None,
        "deep/er/a.MKV": None,
        "link.mp4": "bad_uri",
        "gone.mp4": "missing",
        "loop.mp4": "missing",
        "pipe.mp4": "not_media",
    }
    followed = {e.video: e.problem for e in list_videos(str(root), follow=True).entries}
    assert followed["link.mp4"] is None
    assert followed["away/secret.mp4"] is None
    assert len(followed) == 8


def test_a_folder_without_media_is_wrong_input(tmp_path: Path) -> None:
    for location in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError):
            list_videos(str(location))
