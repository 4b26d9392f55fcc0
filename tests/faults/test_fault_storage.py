"""Object storage that fails, disks that are full, and files that were tampered with: retried, or a clean stop."""

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import storage_faults
from pipelines.data.source import SourceReader
from pipelines.data.storage import open_folder
from pipelines.errors import EnvironmentFailed, InputError, MediaError
from tests.storage_servers import ERRORS, FOR_EVER, Faults, broken_s3, s3, s3_address

__all__ = ["broken_s3", "s3", "s3_address"]
ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(256)) * 10_000
RETRIED_ANSWERS = ("500", "503", "SlowDown", "RequestTimeTooSkewed", "RequestTimeout", "silence", "reset")
RETRIED_BODIES = ("short", "flip")


def download(uri: str) -> str:
    """sha256 of an object by way of a source's copy."""
    reader = SourceReader()
    try:
        with reader.open(uri) as media:
            assert hashlib.sha256(media.path.read_bytes()).hexdigest() == media.sha256
            return media.sha256
    finally:
        reader.close()


@pytest.mark.parametrize("kind", [*RETRIED_ANSWERS, *RETRIED_BODIES])
def test_fault_18_reads_from_s3_are_tried_again_and_give_the_right_bytes(
    broken_s3: tuple[str, Faults], kind: str
) -> None:
    uri, faults = broken_s3
    folder = open_folder(f"{uri}/in")
    folder.write_bytes("clip.mp4", CONTENT)
    times = 2 if kind == "silence" else 4
    for read in (lambda: folder.read_bytes("clip.mp4") == CONTENT, lambda: download(f"{uri}/in/clip.mp4") == HASH):
        faults.inject(kind, times)
        assert read()
        assert faults.injected == times
    if kind in RETRIED_ANSWERS:
        faults.inject(kind, times)
        assert folder.list_infos() == {"clip.mp4": len(CONTENT)}
        assert faults.injected == times


HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("kind", [k for k in RETRIED_ANSWERS if k != "reset"] + ["lost_reply"])
def test_fault_18_writes_to_s3_are_tried_again_and_a_lost_answer_is_not_taken_for_another_writer(
    broken_s3: tuple[str, Faults], kind: str
) -> None:
    uri, faults = broken_s3
    folder = open_folder(f"{uri}/out")
    times = 2 if kind == "silence" else 3
    for only_if_absent in (True, False):
        faults.inject(kind, times, method="PUT")
        folder.write_bytes("part", CONTENT, only_if_absent=only_if_absent)
        assert faults.injected == times
        assert folder.read_bytes("part") == CONTENT
    faults.inject(kind, 1, method="PUT")
    with pytest.raises(FileExistsError):
        folder.write_bytes("part", b"another's", only_if_absent=True)
    assert folder.read_bytes("part") == CONTENT


@pytest.mark.parametrize("kind", ["500", "SlowDown", "RequestTimeTooSkewed", "reset"])
def test_fault_18_parquet_on_s3_is_read_again_from_the_start(broken_s3: tuple[str, Faults], kind: str) -> None:
    uri, faults = broken_s3
    folder = open_folder(f"{uri}/in")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": list(range(20_000))}), sink)
    folder.write_bytes("part", sink.getvalue().to_pybytes())
    # pyarrow asks for the size with HEAD, whose answer has no body to say what is wrong.
    for method in ("HEAD", "GET") if kind in ERRORS else ("GET",):
        faults.inject(kind, 4, method=method, matches=lambda target: "list-type" not in target)
        assert folder.use_file("part", lambda file: pq.read_table(file).num_rows) == 20_000
        assert faults.injected == 4


@pytest.mark.parametrize("kind", ["503", "RequestTimeTooSkewed", "reset", "short", "flip"])
def test_fault_18_a_store_that_never_gets_better_ends_in_a_clean_stop(
    broken_s3: tuple[str, Faults], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, faults = broken_s3
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(storage_faults, "LONGEST_WAIT_S", 0.02)
    folder = open_folder(f"{uri}/in")
    folder.write_bytes("clip.mp4", CONTENT)
    faults.inject(kind, FOR_EVER)
    for read in (lambda: folder.read_bytes("clip.mp4"), lambda: download(f"{uri}/in/clip.mp4")):
        with pytest.raises(EnvironmentFailed) as caught:
            read()
        assert f"{uri}/in/clip.mp4: " in str(caught.value)
        assert str(caught.value).endswith(f"{storage_faults.ATTEMPTS} times; run the same command again")
    assert faults.injected == 2 * storage_faults.ATTEMPTS
    assert not list(tmp_path.iterdir())


def test_fault_18_a_store_that_cannot_be_reached_ends_in_a_clean_stop(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_faults, "FIRST_WAIT_S", 0.001)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        for act in (
            lambda: open_folder(s3).read_bytes("x"),
            lambda: open_folder(s3).write_bytes("x", b"x"),
            lambda: open_folder(s3).list_names(),
        ):
            with pytest.raises(EnvironmentFailed, match=rf"{s3}.*run the same command again"):
                act()


def test_fault_19_what_s3_refuses_is_not_tried_again_and_names_the_uri(broken_s3: tuple[str, Faults]) -> None:
    uri, faults = broken_s3
    open_folder(uri).write_bytes("in/clip.mp4", CONTENT)
    nowhere = "s3://no-such-bucket/in"
    for where, denied in ((f"{uri}/in", True), (nowhere, False)):
        folder = open_folder(where)
        acts: dict[str, Callable[[], object]] = {
            "GET": lambda: folder.read_bytes("clip.mp4"),  # noqa: B023
            "copy": lambda: download(f"{where}/clip.mp4"),  # noqa: B023
            "list": folder.list_names,
            "PUT": lambda: folder.write_bytes("part", b"x"),  # noqa: B023
        }
        for name, act in acts.items():
            faults.inject("AccessDenied", FOR_EVER if denied else 0, method="PUT" if name == "PUT" else "GET")
            with pytest.raises(InputError, match=where) as caught:
                act()
            assert "check the bucket, the credentials" in str(caught.value)
            assert len(faults.seen) == 1, name
    faults.inject("AccessDenied", FOR_EVER)
    with pytest.raises(InputError, match=f"{uri}/in"):
        open_folder(f"{uri}/in").use_file("clip.mp4", lambda file: file.read())


def test_fault_19_a_missing_object_is_a_missing_clip(broken_s3: tuple[str, Faults]) -> None:
    uri, faults = broken_s3
    faults.inject("", 0)
    with pytest.raises(MediaError) as caught:
        download(f"{uri}/in/gone.mp4")
    assert caught.value.reason == "missing"
    with pytest.raises(FileNotFoundError):
        open_folder(f"{uri}/in").read_bytes("gone.mp4")
    assert len(faults.seen) == 2


def test_fault_19_without_credentials_the_message_says_so(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InputError, match=rf"{s3}/x: Unable to locate credentials; check .*AWS_ENDPOINT_URL"):
        open_folder(s3).read_bytes("x")


def test_fault_18_ranges_of_a_tar_on_s3_are_tried_again(broken_s3: tuple[str, Faults]) -> None:
    uri, faults = broken_s3
    open_folder(uri).write_bytes("shard.tar", CONTENT)
    reader = SourceReader()
    for offset, kind in enumerate(("500", "reset", "short")):
        faults.inject(kind, 3)
        with reader.open(f"{uri}/shard.tar", offset, 100_000) as media:
            assert media.path.read_bytes() == CONTENT[offset : offset + 100_000]
        assert faults.injected == 3
    reader.close()


def limited(command: str, *, file_kib: int) -> list[str]:
    """A shell that runs a command under a limit on the size of files: what a quota looks like to a process."""
    return ["bash", "-c", f"ulimit -f {file_kib}; {command}"]
