"""Copies of an object store's files on this machine, and files on their way to one."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.data import local_copies, object_store
from pipelines.data.local_copies import UNUSED_S, Listed, copy_of, forget, place_of
from pipelines.data.scratch import scratch_folder
from pipelines.data.storage import Folder, open_folder
from pipelines.errors import ContractError, EnvironmentFailed
from tests.storage_servers import Faults, broken_s3, s3, s3_address

__all__ = ["broken_s3", "s3", "s3_address"]
CONTENT = bytes(range(256)) * 64


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def _listed(name: str, content: bytes) -> Listed:
    return Listed(name, len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def folder(s3: str) -> Folder:
    folder = open_folder(f"{s3}/model")
    folder.write_bytes("network", CONTENT)
    folder.write_bytes("below/config", b"{}")
    return folder


FILES = [_listed("network", CONTENT), _listed("below/config", b"{}")]


def test_a_copy_holds_what_is_asked_for_and_is_read_from_storage_once(folder: Folder) -> None:
    place = copy_of(folder, FILES, only=["below/config"])
    assert place == place_of(FILES)
    assert [path.name for path in place.rglob("*") if path.is_file() and path.name[0] != "."] == ["config"]
    assert copy_of(folder, FILES) == place
    assert (place / "network").read_bytes() == CONTENT
    folder.delete("network")
    assert copy_of(folder, FILES) == place
    forget(place)
    with pytest.raises(ContractError, match=f"{folder.uri}/network is missing"):
        copy_of(folder, FILES)


def test_a_copy_that_was_altered_here_is_made_again_and_what_was_altered_there_is_refused(folder: Folder) -> None:
    network = copy_of(folder, FILES) / "network"
    network.write_bytes(CONTENT[::-1])
    copy_of(folder, FILES, trusting=True)
    assert network.read_bytes() == CONTENT[::-1]
    copy_of(folder, FILES)
    assert network.read_bytes() == CONTENT
    folder.write_bytes("network", CONTENT[::-1])
    forget(network.parent)
    with pytest.raises(ContractError, match=f"{folder.uri}/network does not have the manifest's sha256"):
        copy_of(folder, FILES)
    assert not network.exists()


def test_a_copy_that_nobody_used_for_long_is_deleted_when_another_is_made(folder: Folder) -> None:
    old, new = copy_of(folder, FILES), [_listed("below/config", b"{}")]
    os.utime(old, (0, old.stat().st_mtime - UNUSED_S - 1))
    copy_of(folder, new)
    assert not old.exists()
    assert place_of(new).exists()


def test_a_file_is_uploaded_in_parts_and_a_part_that_fails_is_sent_again(
    broken_s3: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, faults = broken_s3
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)
    content = os.urandom(12 << 20)
    faults.inject("503", 1, method="PUT", matches=lambda target: "partNumber=2" in target)
    with open_folder(uri).new_file("large") as path:
        path.write_bytes(content)
    assert faults.injected == 1
    parts = [target for method, target in faults.seen if method == "PUT"]
    assert sum("partNumber=1" in target for target in parts) == 1
    assert sum("partNumber=2" in target for target in parts) == 2
    assert open_folder(uri).read_bytes("large") == content


def _fail_in(folder: Folder, error: Exception) -> None:
    with folder.new_file("file") as path:
        path.write_bytes(b"half")
        raise error


@pytest.mark.parametrize("is_local", [True, False])
def test_a_file_whose_writing_fails_leaves_what_was_there(s3: str, tmp_path: Path, is_local: bool) -> None:
    folder = open_folder(tmp_path / "out" if is_local else s3)
    folder.write_bytes("file", b"old")
    with pytest.raises(KeyError):
        _fail_in(folder, KeyError())
    with pytest.raises(EnvironmentFailed, match="No space left on device; the disk is full"):
        _fail_in(folder, OSError(28, os.strerror(28)))
    assert folder.list_infos(recursive=True) == {"file": 3}
    with folder.new_file("file") as path:
        path.write_bytes(b"whole")
    assert folder.read_bytes("file") == b"whole"
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.glob("multisoundgen-*"))


def test_a_scratch_of_a_killed_process_is_deleted_and_one_in_use_is_not(tmp_path: Path) -> None:
    program = (
        "import os, signal\nfrom pipelines.data.scratch import scratch_folder\n"
        "with scratch_folder() as folder:\n    print(folder, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    with scratch_folder() as mine:
        assert not left.parent.exists()
        with scratch_folder() as other:
            assert mine.is_dir()
            assert other.is_dir()
    assert not mine.parent.exists()


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert local_copies.cache_folder() == tmp_path / "cache" / "multisoundgen" / "artifacts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert local_copies.cache_folder() == tmp_path / "home" / ".cache" / "multisoundgen" / "artifacts"
