"""WebDataset shards: samples found by their headers, with caption, description and sound beside them."""

import json
import os
import random
import struct
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.data.ingest import read_entries
from pipelines.data.media_folder import list_videos
from pipelines.data.plan import plan_rows, plan_windows
from pipelines.data.source import SourceReader
from pipelines.data.storage import open_folder
from pipelines.errors import InputError
from tests.pipelines.tar_factory import add_member, write_tar
from tests.storage_servers import Faults, broken_s3, s3, s3_address

__all__ = ["broken_s3", "s3", "s3_address"]

EVENT = {"time_s": 0.5, "duration_s": 0.1, "kind": "ball", "variant": "red"}


def shard(path: Path) -> dict[str, bytes]:
    """A shard of two samples in no order; what it holds."""
    said = {"caption": "a dog", "split": "val", "start_s": 1.5, "duration_s": 4, "events": [EVENT], "width": 640}
    members = {
        "two.wav": b"w" * 700,
        "a/one.json": json.dumps(said).encode(),
        "two.mp4": b"2" * 70_000,
        "a/one.mp4": b"1" * 1000,
        "two.txt": b"\xef\xbb\xbfcaf\xe9\n",
        "README.md": b"x",
    }
    write_tar(path, members)
    return members


def test_members_of_a_sample_are_one_entry_in_whatever_order_they_lie(tmp_path: Path) -> None:
    members = shard(tmp_path / "shards" / "s.tar")
    two, one = list_videos(str(tmp_path / "shards"), default_split="rpo").rows()
    assert (one["video"], one["member"], one["caption"], one["split"]) == (
        "s.tar!/a/one.mp4",
        "a/one.mp4",
        "a dog",
        "val",
    )
    assert (one["start_s"], one["duration_s"], one["events"], one["sound_uri"]) == (1.5, 4.0, [EVENT], None)
    assert (two["caption"], two["split"], two["start_s"], two["duration_s"]) == ("caf\ufffd", "rpo", 0.0, None)
    for row, name in ((one, "a/one.mp4"), (two, "two.mp4")):
        with SourceReader().open(row["uri"], row["offset"], row["size_bytes"]) as media:
            assert media.path.read_bytes() == members[name]
    with SourceReader().open(two["sound_uri"], two["sound_offset"], two["sound_size_bytes"]) as media:
        assert media.path.read_bytes() == members["two.wav"]


def test_a_single_tar_gives_what_its_folder_gives(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar")
    assert list_videos(str(tmp_path / "s.tar")).table.equals(list_videos(str(tmp_path)).table)


def test_shards_on_an_object_store_are_read_by_ranges_and_through_faults(
    tmp_path: Path, broken_s3: tuple[str, Faults]
) -> None:
    uri, faults = broken_s3
    size_bytes = 1 << 20
    here = write_tar(
        tmp_path / "s.tar", {f"{i}.{k}": b"x" * n for i in range(3) for k, n in (("mp4", size_bytes), ("txt", 9))}
    )
    open_folder(uri).write_bytes("shards/s.tar", here.read_bytes())
    expected = [(r["offset"], r["size_bytes"], r["caption"]) for r in list_videos(str(here)).rows()]
    for kind in ("reset", "503"):
        faults.inject(kind, 2, matches=lambda target: "s.tar" in target)
        rows = list_videos(f"{uri}/shards").rows()
        assert faults.injected == 2
        assert [(r["offset"], r["size_bytes"], r["caption"]) for r in rows] == expected
    with SourceReader().open(rows[1]["uri"], rows[1]["offset"], rows[1]["size_bytes"]) as media:
        assert media.path.stat().st_size == size_bytes


def test_a_name_with_dots_finds_its_own_caption_first(tmp_path: Path) -> None:
    members = {
        "v1.2_000030.mp4": b"x",
        "v1.2_000030.txt": b"mine",
        "v1.txt": b"of the key",
        "v1.5.mp4": b"y",
        "d.x/k.left.mp4": b"z",
        "d.x/k.txt": b"of the sample",
        "d.txt": b"of nobody",
    }
    write_tar(tmp_path / "s.tar", members)
    captions = {r["member"]: r["caption"] for r in list_videos(str(tmp_path)).rows()}
    assert captions == {"v1.2_000030.mp4": "mine", "v1.5.mp4": "of the key", "d.x/k.left.mp4": "of the sample"}


def test_names_that_are_long_or_no_utf_8_are_kept(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    members = {f"./{odd}.mp4": b"x", "l" * 300 + "/" + "m" * 200 + ".mp4": b"y"}
    (tmp_path / odd).mkdir()
    write_tar(tmp_path / odd / "s.tar", members)
    rows = list_videos(str(tmp_path)).rows()
    assert {r["video"] for r in rows} == {f"{odd}/s.tar!/{name.removeprefix('./')}" for name in members}
    plan = plan_windows(list_videos(str(tmp_path)), clip_s=2.5)
    assert {r["clip_id"] for r in plan_rows(plan, 0, 2)} == {"caf%E9", "m" * 200}


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"[1]", "not a JSON object"),
        (b"{", "beside it: "),
        (b"[" * 100_000, "beside it: "),
        (b'{"split": "dev"}', "split 'dev'"),
        (b'{"start_s": "soon"}', "start_s 'soon' is not a number"),
        (b'{"duration_s": 0}', "duration_s is 0"),
        (b'{"caption": 7}', "the caption is 7"),
        (b'{"events": 3}', "events must be"),
    ],
)
def test_a_description_that_cannot_be_read_rejects_its_sample_alone(
    tmp_path: Path, content: bytes, detail: str
) -> None:
    write_tar(tmp_path / "s.tar", {"a.mp4": b"x", "a.json": content, "b.mp4": b"y"})
    a, b = list_videos(str(tmp_path)).rows()
    assert (a["reason"], b["reason"]) == ("not_media", None)
    assert detail in a["detail"]


def test_what_is_huge_is_not_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.mp4": b"x", "a.txt": b"y" * (1 << 21), "b.mp4": b"y"})
    a, b = list_videos(str(tmp_path)).rows()
    assert (a["reason"], b["reason"]) == ("too_large", None)
    # A header that says it is 8 GiB long is not read either.
    path = tmp_path / "pax.tar"
    with tarfile.open(path, "w") as tar:
        add_member(tar, "x", type=tarfile.XHDTYPE)
    content = bytearray(path.read_bytes())
    content[124:136] = struct.pack(">B3xQ", 0x80, 8 << 30)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    (row,) = list_videos(str(path)).rows()
    assert row["reason"] == "not_media"
    assert "a header says" in row["detail"]


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_a_compressed_tar_under_a_plain_name_is_wrong_input(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content + bytes(600))
    with pytest.raises(InputError, match=r"s\.tar is compressed"):
        list_videos(str(tmp_path))


def test_damaged_shards_never_raise_hang_or_point_outside_themselves(tmp_path: Path) -> None:
    shard(tmp_path / "whole.tar")
    whole = (tmp_path / "whole.tar").read_bytes()
    rng = random.Random(5)
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    for index in range(120):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 3, 30])):
            # Most of a tar is content, which nobody parses: damage goes to the headers.
            content[rng.choice(headers) + rng.randrange(512)] = rng.randrange(256)
        for at in headers if rng.random() < 0.7 else []:
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
        cut = rng.randrange(len(content)) if rng.random() < 0.3 else len(content)
        (tmp_path / "damaged.tar").write_bytes(content[:cut])
        with suppress(InputError):
            # Nothing left to use, and nothing else, is wrong input.
            for row in list_videos(str(tmp_path / "damaged.tar")).rows():
                assert row["reason"] or 0 < row["offset"] <= row["offset"] + row["size_bytes"] <= cut, (index, row)


def test_a_manifest_may_not_be_a_tar(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar")
    with pytest.raises(InputError):
        read_entries(str(tmp_path / "s.tar"))
