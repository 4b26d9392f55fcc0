"""Object storage that fails, disks that are full, and files that were tampered with: retried, or a clean stop."""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.preprocess import Options, main
from pipelines.data import storage_faults
from pipelines.data.contracts import FEATURES
from pipelines.data.source import SourceReader
from pipelines.data.storage import open_folder
from pipelines.data.store import Dataset, files_manifest, open_files
from pipelines.errors import ContractError, EnvironmentFailed, InputError, MediaError
from pipelines.stage import StageContext, run_stage, untracked
from tests.faults.small_disk import SmallDisk
from tests.faults.test_preprocess_kill import flags, make_clips, run_here
from tests.storage_servers import ERRORS, FOR_EVER, Faults, broken_s3, s3, s3_address

__all__ = ["broken_s3", "s3", "s3_address"]
ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(256)) * 10_000
HASH = hashlib.sha256(CONTENT).hexdigest()
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
            "GET": partial(folder.read_bytes, "clip.mp4"),
            "copy": partial(download, f"{where}/clip.mp4"),
            "list": folder.list_names,
            "PUT": partial(folder.write_bytes, "part", b"x"),
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


@dataclass(frozen=True)
class Quiet:
    """A corpus on the local disk, and what an undisturbed run makes of it."""

    manifest: Path
    digest: str
    counts: dict[str, int]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    folder = tmp_path_factory.mktemp("corpus")
    manifest = make_clips(folder, 2)
    whole = run_here(manifest, folder / "whole")
    return Quiet(manifest=manifest, digest=whole.digest, counts=whole.manifest["counts"])


def run_on(location: str, out: str) -> Dataset:
    main(Options(manifest=location, out=out, num_workers=0, max_reject_rate=0.5))
    return Dataset.open(out, FEATURES)


def test_fault_18_a_corpus_on_a_failing_s3_becomes_the_dataset_of_a_quiet_run_on_a_local_disk(
    broken_s3: tuple[str, Faults], quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, faults = broken_s3
    # A journal of a folder on an object store would be shipped by a process of its own.
    monkeypatch.setattr("pipelines.data.preprocess.run_stage", partial(run_stage, track=untracked))
    source = open_folder(f"{uri}/in")
    for path in quiet.manifest.parent.iterdir():
        if path.is_file():
            source.write_bytes(path.name, path.read_bytes())
    faults.inject("SlowDown", 7, method="GET", matches=lambda target: ".mp4" in target or "list-type" in target)
    dataset = run_on(f"{uri}/in/clips.csv", f"{uri}/out")
    assert faults.injected == 7
    assert (dataset.digest, dataset.manifest["counts"]) == (quiet.digest, quiet.counts)
    assert dataset.read(["clip_id"]).num_rows == quiet.counts["out"]


def assert_nothing_half_visible(out: Path) -> None:
    """Every file of the dataset that has a name is whole, there is no manifest, and no temporary file is left."""
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.endswith(".tmp")]
    assert not (out / "manifest.json").exists()
    for path in files:
        if path.suffix == ".parquet":
            pq.read_table(path)
        if path.name == "stage.json":
            json.loads(path.read_text())


def stop_and_resume(quiet: Quiet, out: Path, hinder: Sequence[str], cause: str, mend: Callable[[], None]) -> None:
    """The job ends with exit code 3 and one line; once the cause is gone, it resumes to the undisturbed dataset."""
    command = [sys.executable, str(ROOT / "jobs" / "preprocess.py"), *flags(quiet.manifest, out, 0)]
    stopped = subprocess.run([*hinder, *command], capture_output=True, text=True, check=False)
    assert stopped.returncode == 3, stopped.stderr
    last = stopped.stderr.strip().splitlines()[-1]
    assert last.startswith(f"preprocess: {out}/")
    assert cause in last
    assert "run the same command again" in last
    assert_nothing_half_visible(out)
    mend()
    dataset = run_on(str(quiet.manifest), str(out))
    assert (dataset.digest, dataset.manifest["counts"]) == (quiet.digest, quiet.counts)


def test_fault_20_a_job_on_a_full_disk_stops_cleanly_and_resumes(quiet: Quiet, tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "disk", "size=300k") as disk:
        out = disk.path / "out"
        stop_and_resume(quiet, out, (), "No space left on device", lambda: disk.remount("size=20m"))
        assert len(list(out.glob("data/part-*"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "hinder", "mended", "cause"),
    [
        ("size=4k", (), "size=20m", "No space left on device"),
        ("size=20m,nr_inodes=12", (), "nr_inodes=100", "or has no inodes left"),
        ("size=20m", ("bash", "-c", 'ulimit -f 60; exec "$@"', "bash"), "size=20m", "ulimit -f"),
        ("size=20m,ro", (), "rw", "mounted read-only"),
    ],
    ids=["before the first part", "inodes", "quota", "read-only"],
)
def test_fault_20_a_job_on_a_hindered_disk_stops_cleanly_and_resumes(
    quiet: Quiet, tmp_path: Path, options: str, hinder: Sequence[str], mended: str, cause: str
) -> None:
    with SmallDisk(tmp_path / "disk", options) as disk:
        stop_and_resume(quiet, disk.path / "out", hinder, cause, lambda: disk.remount(mended))


def test_fault_20_a_write_that_does_not_fit_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "disk", "size=256k,nr_inodes=20") as disk:
        folder = open_folder(disk.path / "out")
        folder.write_bytes("part", b"old")
        for only_if_absent, name in ((False, "part"), (True, "other"), (False, "new/part")):
            with pytest.raises(EnvironmentFailed, match=r"No space left on device; the disk is full .*run the same"):
                folder.write_bytes(name, CONTENT, only_if_absent=only_if_absent)
        assert folder.read_bytes("part") == b"old"
        assert folder.list_infos(recursive=True) == {"part": 3}
        disk.remount("ro")
        with pytest.raises(EnvironmentFailed, match="mounted read-only"):
            folder.write_bytes("part", b"new")
        disk.remount("rw")
        with pytest.raises(EnvironmentFailed, match="no inodes left"):
            any(folder.write_bytes(f"{i}", b"x") for i in range(20))
        disk.remount("size=20m,nr_inodes=100")
        folder.write_bytes("part", CONTENT)
        assert folder.read_bytes("part") == CONTENT
        assert not list(disk.path.rglob("*.tmp"))


def test_fault_20_a_full_temporary_folder_stops_the_job_and_costs_no_clip(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{s3}/in/clip.mp4"
    open_folder(f"{s3}/in").write_bytes("clip.mp4", CONTENT)
    with SmallDisk(tmp_path / "disk", "size=256k") as disk:
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setenv("TMPDIR", str(disk.path))
        with pytest.raises(EnvironmentFailed, match=rf"{disk.path}/clip-.*No space left on device"):
            download(uri)
        assert not list(disk.path.iterdir())
        disk.remount("size=20m")
        assert download(uri) == HASH


def test_fault_32_a_reader_trusts_the_manifest_alone_and_names_what_is_missing_or_cut(
    quiet: Quiet, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    shutil.copytree(quiet.manifest.parent / "whole", made)
    rows = Dataset.open(str(made), FEATURES).read(["clip_id"])
    shard = next(path for path in sorted((made / "data").iterdir()) if path.stat().st_size)
    content = shard.read_bytes()
    # Foreign files, one of them without a footer, and a copy of a shard: all unlisted, so all unread.
    (made / "data" / "part-zzz.parquet").write_bytes(content[:1000])
    (made / "data" / "part-twice.parquet").write_bytes(content)
    (made / "data" / "notes.txt").write_text("mine")
    opened = Dataset.open(str(made), FEATURES)
    assert opened.read(["clip_id"]).equals(rows)
    assert opened.digest == quiet.digest
    shard.write_bytes(content[:-100])
    with pytest.raises(ContractError, match=rf"{shard.name} has {len(content) - 100} bytes, the manifest says"):
        Dataset.open(str(made), FEATURES)
    shard.unlink()
    with pytest.raises(ContractError, match=rf"{shard.name} is missing"):
        Dataset.open(str(made), FEATURES)


def test_fault_32_a_file_whose_hash_differs_is_named(tmp_path: Path) -> None:
    content = {"network.safetensors": b"weights", "config.json": b"{}"}
    folder = open_folder(tmp_path / "model")

    def body(context: StageContext) -> None:
        for name, written in content.items():
            context.folder.write_bytes(name, written)
        context.finish({"kind": "policy", "files": files_manifest(context.folder, list(content))})

    run_stage(name="train", config={}, inputs={}, out=folder.uri, body=body, say=lambda line: None)
    (tmp_path / "model" / "network.safetensors").write_bytes(b"Weights")
    with pytest.raises(ContractError, match=r"network\.safetensors does not have the manifest's sha256"):
        open_files(folder.uri, "policy")
