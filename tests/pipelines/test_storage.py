"""Folders and sources on a local disk and on S3: what is there, what is whole, and who may write."""

import concurrent.futures
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.source import SourceReader
from pipelines.data.storage import Folder, open_folder
from pipelines.errors import EnvironmentFailed, InputError, MediaError
from tests.storage_servers import BUCKET, s3, s3_address

__all__ = ["s3", "s3_address"]


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder of either storage."""
    if request.param == "local":
        return open_folder(tmp_path / "out")
    return open_folder(f"{request.getfixturevalue('s3')}/some/out")


def test_what_is_written_is_read_listed_and_deleted(folder: Folder) -> None:
    assert not folder.exists("data")
    assert folder.list_names() == []
    assert folder.list_infos("data") == {}
    contents = {f"part-{i}.parquet": bytes([i]) * i for i in range(4)}
    for name, content in contents.items():
        folder.write_bytes(f"data/{name}", content)
    folder.write_bytes("manifest.json", b"{}")
    assert folder.list_names() == ["data", "manifest.json"]
    assert folder.list_infos() == {"manifest.json": 2}
    assert folder.list_infos("data") == {name: len(content) for name, content in contents.items()}
    assert folder.list_infos(recursive=True) == {
        **{f"data/{name}": len(content) for name, content in contents.items()},
        "manifest.json": 2,
    }
    assert dict(folder.read_many([f"data/{name}" for name in contents])) == {
        f"data/{name}": content for name, content in contents.items()
    }
    assert folder.exists("data")
    assert folder.exists("data/part-1.parquet")
    # A prefix of a name is not a name.
    assert not folder.exists("data/part")
    assert folder.size_bytes("data/part") is None
    assert folder.size_bytes("data/part-3.parquet") == 3
    assert folder.size_bytes("data") is None
    assert folder.sha256("data/part-3.parquet") == hashlib.sha256(b"\3\3\3").hexdigest()
    folder.delete("data/part-3.parquet")
    folder.delete("data/part-3.parquet")
    assert folder.list_names("data") == ["part-0.parquet", "part-1.parquet", "part-2.parquet"]
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("data/part-3.parquet")
    with pytest.raises(FileNotFoundError):
        folder.use_file("data/part-3.parquet", lambda file: file.read())


def test_a_name_that_is_taken_keeps_its_content_when_written_on_condition(folder: Folder) -> None:
    folder.write_bytes("manifest.json", b"first", only_if_absent=True)
    with pytest.raises(FileExistsError):
        folder.write_bytes("manifest.json", b"second", only_if_absent=True)
    assert folder.read_bytes("manifest.json") == b"first"
    folder.write_bytes("manifest.json", b"third")
    assert folder.read_bytes("manifest.json") == b"third"
    assert folder.list_names() == ["manifest.json"]


def claim(location: str, name: str, writer: int) -> bool:
    try:
        open_folder(location).write_bytes(name, f"writer {writer}".encode(), only_if_absent=True)
    except FileExistsError:
        return False
    return True


def claim_all(location: str, writer: int, names: list[str], barrier: "threading.Barrier") -> list[bool]:
    won = []
    for name in names:
        barrier.wait(60)
        won.append(claim(location, name, writer))
    return won


def test_of_many_threads_that_write_one_name_exactly_one_wins(folder: Folder) -> None:
    names = [f"lease/{i}.json" for i in range(12)]
    barrier = threading.Barrier(6)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(claim_all, folder.uri, writer, names, barrier) for writer in range(6)]
        won = [future.result() for future in asked]
    for index, name in enumerate(names):
        winners = [writer for writer in range(6) if won[writer][index]]
        assert len(winners) == 1
        assert folder.read_bytes(name) == f"writer {winners[0]}".encode()


def test_parquet_is_read_at_random_places(folder: Folder) -> None:
    table = pa.table({"x": list(range(1000)), "y": [str(i) for i in range(1000)]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=100)
    folder.write_bytes("data/part-0.parquet", sink.getvalue().to_pybytes())
    group = folder.use_file("data/part-0.parquet", lambda file: pq.ParquetFile(file).read_row_group(7, columns=["x"]))
    assert group["x"].to_pylist() == list(range(700, 800))


def test_writing_makes_neither_buckets_nor_folder_objects(s3: str) -> None:
    import boto3

    open_folder(f"{s3}/a/b").write_bytes("c/d.txt", b"x")
    client = boto3.client("s3")
    assert [found["Key"] for found in client.list_objects_v2(Bucket=BUCKET)["Contents"]] == ["a/b/c/d.txt"]
    with pytest.raises(InputError, match="s3://no-such-bucket/out/x"):
        open_folder("s3://no-such-bucket/out").write_bytes("x", b"x")
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == [BUCKET]


def test_a_listing_may_come_in_several_pages(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "7")
    folder = open_folder(f"{s3}/out")
    for i in range(20):
        folder.write_bytes(f"data/{i:04d}", b"ab")
    assert folder.list_infos("data") == {f"{i:04d}": 2 for i in range(20)}


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:secret@bucket/x",
        "s3://bucket/x?endpoint_override=elsewhere",
        "gs://bucket/x",
        "s3://",
        "http://host/x",
    ],
)
def test_a_uri_of_another_storage_or_with_credentials_is_refused(uri: str) -> None:
    with pytest.raises(InputError) as caught:
        open_folder(uri)
    assert "secret" not in str(caught.value)


def test_what_killed_writers_left_is_invisible_and_can_be_removed(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.write_bytes("data/part-0", b"whole")
    (tmp_path / "data" / ".part-1.0123.tmp").write_bytes(b"ha")
    (tmp_path / "data" / ".hidden").write_bytes(b"somebody's")
    assert folder.list_infos("data") == {".hidden": 10, "part-0": 5}
    assert folder.remove_temporaries("data") == 1
    assert folder.remove_temporaries("rejects") == 0
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [".hidden", "part-0"]


def test_a_path_that_cannot_be_right_is_said_to_be_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for name, where in (("x", tmp_path / "file"), ("y" * 300, tmp_path)):
        with pytest.raises(InputError, match=r"is a file|too long"):
            open_folder(where).write_bytes(name, b"x")
        with pytest.raises(InputError, match=r"is a file|too long"):
            open_folder(where).write_bytes(name, b"x", only_if_absent=True)


Place = Callable[[str, bytes], str]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Puts bytes on either storage; gives their path or URI."""
    where = str(tmp_path / "in") if request.param == "local" else f"{request.getfixturevalue('s3')}/in"

    def put(name: str, content: bytes) -> str:
        open_folder(where).write_bytes(name, content)
        return f"{where}/{name}"

    return put


def test_a_member_of_a_tar_is_opened_as_a_file_of_its_own(place: Place) -> None:
    content = bytes(range(256)) * 9000
    uri = place("shard 0%?#.tar", content)
    reader = SourceReader()
    for offset, size in ((512, 1000), (0, 10), (len(content) - 7, 7), (1_000_000, 1_200_000), (5, 0)):
        member = content[offset : offset + size]
        with reader.open(uri, offset, size) as media:
            assert media.path.read_bytes() == member
            assert media.sha256 == hashlib.sha256(member).hexdigest()
    for offset, size in ((len(content) - 7, 8), (len(content) + 100, 1)):
        with pytest.raises(MediaError) as caught, reader.open(uri, offset, size):
            pass
        assert caught.value.reason == "truncated"
    with pytest.raises(MediaError) as caught, reader.open(f"{uri}.gone", 0, 1):
        pass
    assert caught.value.reason == "missing"
    reader.close()


def test_a_copy_is_made_once_for_windows_in_a_row_and_lives_as_long_as_somebody_reads_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    uri = place("a.tar", b"abcdef")
    reader = SourceReader()
    with reader.open(uri, 0, 3) as first:
        with reader.open(uri, 0, 3) as again:
            assert again.path == first.path
        with reader.open(uri, 3, 3) as second:
            # Picture and sound of one clip may come from two files, open at once.
            assert (first.path.read_bytes(), second.path.read_bytes()) == (b"abc", b"def")
    assert [p.read_bytes() for p in tmp_path.glob("clip-*")] == [b"def"]
    reader.close()
    assert not list(tmp_path.glob("clip-*"))


def test_no_other_storage_and_no_special_file_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    found = {}
    reader = SourceReader()
    paths = [str(tmp_path / name) for name in ("pipe", "dangling", "circle")]
    for uri in (*paths, "/dev/zero", "gs://bucket/x", "s3://bucket/\udcff"):
        for size in (None, 4):
            with pytest.raises(MediaError) as caught, reader.open(uri, size_bytes=size):
                pass
            found.setdefault(Path(uri).name, set()).add(caught.value.reason)
    assert found == {
        "pipe": {"not_media"},
        "zero": {"not_media"},
        "dangling": {"missing"},
        "circle": {"missing"},
        "x": {"bad_uri"},
        "\udcff": {"bad_uri"},
    }


def test_a_machine_without_file_descriptors_does_not_lose_a_clip(tmp_path: Path) -> None:
    import resource

    (tmp_path / "clip.mp4").write_bytes(b"x")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader, folder = SourceReader(), open_folder(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        with (
            pytest.raises(EnvironmentFailed, match="too many files open: raise ulimit -n"),
            reader.open(str(tmp_path / "clip.mp4")),
        ):
            pass
        with pytest.raises(EnvironmentFailed, match="too many files open"):
            folder.write_bytes("part", b"x")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert folder.list_names() == ["clip.mp4"]
