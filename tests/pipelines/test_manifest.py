"""Our own manifests: csv, tsv and Parquet become entries; what cannot be parsed is named with its line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.ingest import read_entries
from pipelines.data.manifest import parse_caption, parse_events, parse_seconds, parse_split
from pipelines.data.plan import plan_windows
from pipelines.errors import InputError


def manifest(folder: Path, content: str | bytes, name: str = "clips.csv") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_a_csv_with_every_column_is_read(tmp_path: Path) -> None:
    events = json.dumps([{"time_s": 0.5, "duration_s": 0.1, "kind": "ball", "variant": "red"}])
    quoted = events.replace('"', '""')
    text = (
        f'video,start_s,duration_s,caption,split,events,label\na b/x.mp4,1.5,,"one, ""two""\nthree",val,"{quoted}",7\n'
    )
    (read,) = read_entries(manifest(tmp_path, text)).rows()
    assert read["uri"] == f"{tmp_path}/a b/x.mp4"
    assert (read["start_s"], read["duration_s"], read["split"], read["line"]) == (1.5, None, "val", 2)
    assert read["caption"] == 'one, "two"\nthree'
    assert read["events"] == [{"time_s": 0.5, "duration_s": 0.1, "kind": "ball", "variant": "red"}]


def test_parquet_with_nulls_and_nested_events_is_read(tmp_path: Path) -> None:
    event = {"time_s": 1.0, "duration_s": 0.2, "kind": "lamp", "variant": "cyan"}
    columns = {
        "video": pa.array([b"a.mp4", b"b\xff.mp4"]),
        "caption": [None, "x"],
        "start_s": [None, 2],
        "events": [[event], None],
        "other": [1, 2],
    }
    pq.write_table(pa.table(columns), tmp_path / "clips.parquet")
    first, second = read_entries(str(tmp_path / "clips.parquet")).rows()
    assert (first["caption"], first["start_s"], first["events"], first["line"]) == ("", 0.0, [event], 1)
    assert (second["caption"], second["start_s"], second["events"], second["line"]) == ("x", 2.0, None, 2)
    assert second["uri"] == f"{tmp_path}/b\udcff.mp4"


def test_rows_without_a_split_belong_to_the_default(tmp_path: Path) -> None:
    location = manifest(tmp_path, "video,split\na.mp4,\nb.mp4,val\n")
    assert [r["split"] for r in read_entries(location).rows()] == ["train", "val"]
    assert [r["split"] for r in read_entries(location, default_split="test").rows()] == ["test", "val"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("video\n", "names no media file"),
        ("file,caption\na.mp4,x\n", "line 1: no column 'video'"),
        ("video,video\na,b\n", "line 1: a column name occurs twice"),
        ('video,caption\na.mp4,"open\n\n\n', "line 2: unexpected end of data"),
        ("video\n\n  \n", "line 3: 'video' is empty"),
        ("video,start_s\na.mp4,soon\n", "line 2: start_s 'soon' is not a number"),
        ("video,start_s\na.mp4,nan\n", "line 2: start_s is nan"),
        ("video,start_s\na.mp4,-1\n", "line 2: start_s is -1"),
        ("video,duration_s\na.mp4,0\n", "line 2: duration_s is 0"),
        ("video,split\na.mp4,dev\n", "line 2: split 'dev' is not one of train, rpo, val, test"),
        ("video,events\na.mp4,[{]\n", "line 2: events must be"),
        ('video,events\na.mp4,"[{""time_s"": 1}]"\n', "line 2: events must be"),
        ("video,events\na.mp4,7\n", "line 2: events must be"),
    ],
)
def test_what_cannot_be_parsed_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_entries(manifest(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_of_another_make_is_wrong_input_with_its_row(tmp_path: Path) -> None:
    location = tmp_path / "clips.parquet"
    for columns, message in (
        ({"file": ["a.mp4"]}, "no column 'video'"),
        ({"video": ["a.mp4", None]}, "line 2: 'video' is empty"),
        ({"video": [1, 2]}, "line 1: 'video' is empty"),
        ({"video": ["a.mp4"], "caption": [5]}, "line 1: the caption is 5, which is not a text"),
        ({"video": ["a.mp4"], "start_s": [float("nan")]}, "line 1: start_s is nan"),
        ({"video": ["a.mp4"], "split": [3]}, "line 1: split '3'"),
    ):
        pq.write_table(pa.table(columns), location)
        with pytest.raises(InputError, match=message):
            read_entries(str(location))


def test_a_missing_manifest_and_a_foreign_kind_are_wrong_input(tmp_path: Path) -> None:
    for location in (str(tmp_path / "absent.csv"), str(tmp_path), str(tmp_path / "absent.parquet")):
        with pytest.raises(InputError, match="does not exist or is not a file"):
            read_entries(location)
    with pytest.raises(InputError, match="not a Parquet file"):
        read_entries(manifest(tmp_path, "video\na.mp4\n", "clips.parquet"))
    with pytest.raises(InputError, match="is UTF-16; save it as UTF-8"):
        read_entries(manifest(tmp_path, "video\na.mp4\n".encode("utf-16")))


def test_values_are_parsed_or_refused() -> None:
    assert parse_caption(float("nan")) == parse_caption(None) == ""
    assert parse_split("", "val") == "val"
    assert parse_seconds(" ", "start_s") is None
    assert parse_events("") is None
    deep = "[" * 100_000
    for call in (
        lambda: parse_caption(3),
        lambda: parse_split(["train"], "train"),
        lambda: parse_seconds("1e999", "start_s"),
        lambda: parse_events(deep),
        lambda: parse_events('[{"time_s": NaN, "duration_s": 1, "kind": "", "variant": ""}]'),
    ):
        with pytest.raises(ValueError, match=r"is|events"):
            call()


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    text = "video,caption\na.mp4,x\nb.mp4,y\n"
    first = read_entries(manifest(tmp_path, text)).fingerprint
    assert read_entries(manifest(tmp_path / "other", text.replace(",", "\t"), "m.tsv")).fingerprint == first
    assert read_entries(manifest(tmp_path, "video,caption\nb.mp4,y\na.mp4,x\n")).fingerprint == first
    assert read_entries(manifest(tmp_path, text.replace("y", "z"))).fingerprint != first


def test_what_stands_in_a_manifest_is_planned_with_its_line(tmp_path: Path) -> None:
    location = manifest(tmp_path, 'video\n"two\nlines.mp4"\nx/a.mp4\ny/a.mp4\n')
    with pytest.raises(InputError, match=r"line 4 \(x/a\.mp4\) and line 5 \(y/a\.mp4\)"):
        plan_windows(read_entries(location), clip_s=2.5)
