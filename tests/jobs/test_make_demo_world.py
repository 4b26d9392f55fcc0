import csv
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.make_demo_world import Options, main
from pipelines.data.demo_world import render_clip
from pipelines.data.demo_world_job import make_demo_world
from pipelines.data.ingest import read_entries
from pipelines.data.store import open_files
from pipelines.errors import InputError, StageConflict

COUNTS = {"train": 5, "rpo": 2, "val": 1, "test": 1}


def make(out: Path, *, seed: int = 0, num_workers: int = 0) -> str:
    return make_demo_world(seed=seed, counts=COUNTS, out=str(out), num_workers=num_workers)


def hashes(folder: Path) -> dict[str, str]:
    files = [*sorted((folder / "clips").iterdir()), folder / "clips.csv"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "a"
    assert make(out) == "run"
    return out


def test_the_manifest_names_every_clip_with_its_split_and_events(world: Path) -> None:
    with (world / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["video", "start_s", "duration_s", "caption", "split", "events"]
    assert [row["split"] for row in rows] == ["train"] * 5 + ["rpo"] * 2 + ["val", "test"]
    assert len({row["caption"] for row in rows}) == 1
    assert {(world / row["video"]).name for row in rows} == {path.name for path in (world / "clips").iterdir()}
    events = json.loads(rows[5]["events"])
    rendered = render_clip(0, int(Path(rows[5]["video"]).stem.removeprefix("demo_"))).events
    assert [(e["time_s"], e["kind"], e["variant"]) for e in events] == [(e.time_s, e.kind, e.variant) for e in rendered]


def test_preprocess_reads_the_manifest_without_a_problem(world: Path) -> None:
    entries = read_entries(str(world / "clips.csv")).rows()
    assert len(entries) == 9
    assert all(e["reason"] is None and e["events"] and Path(e["uri"]).is_file() for e in entries)


def test_the_finished_world_is_skipped_and_another_one_is_refused(world: Path) -> None:
    before = hashes(world)
    assert make(world) == "skip"
    assert make(world, num_workers=2) == "skip"
    with pytest.raises(StageConflict, match="seed: 0 there, 1 asked"):
        make(world, seed=1)
    assert hashes(world) == before
    open_files(str(world), "demo_world")


def test_a_broken_off_run_goes_on_and_ends_the_same(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    make(out)
    # As a kill leaves it: no manifests yet, one clip missing, one cut short by a full disk, one half-made temporary.
    (out / "manifest.json").unlink()
    (out / "clips.csv").unlink()
    (out / "clips" / "demo_000001.mp4").unlink()
    whole = out / "clips" / "demo_000003.mp4"
    whole.write_bytes(whole.read_bytes()[:2000])
    (out / "clips" / ".demo_000001.mp4.x.tmp").write_bytes(b"half")
    untouched = out / "clips" / "demo_000000.mp4"
    inode = untouched.stat().st_ino
    assert make(out) == "resume"
    (out / "clips" / ".demo_000001.mp4.x.tmp").unlink()
    assert hashes(out) == hashes(world)
    assert untouched.stat().st_ino == inode


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = ["--out", str(killed), "--num-train=60", "--num-rpo=0", "--num-val=0", "--num-test=0", "--num-workers=0"]
    process = subprocess.Popen([sys.executable, "-m", "jobs.make_demo_world", *command], stdout=subprocess.DEVNULL)
    try:
        while len(list(killed.glob("clips/*.mp4"))) < 5:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not (killed / "clips.csv").exists()
    counts = {"train": 60, "rpo": 0, "val": 0, "test": 0}
    assert make_demo_world(seed=0, counts=counts, out=str(killed), num_workers=0) == "resume"
    assert make_demo_world(seed=0, counts=counts, out=str(whole), num_workers=0) == "run"
    for leftover in killed.glob("clips/.*"):
        leftover.unlink()
    assert hashes(killed) == hashes(whole)


@pytest.mark.ray
def test_ray_tasks_make_the_same_bytes(world: Path, tmp_path: Path, ray_cluster: None) -> None:
    assert make(tmp_path / "ray", num_workers=2) == "run"
    assert hashes(tmp_path / "ray") == hashes(world)


def test_the_job_runs_from_its_options_and_keeps_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "world"
    assert main(Options(out=str(out), num_train=1, num_rpo=0, num_val=0, num_test=1, num_workers=0)) == 0
    assert f"manifest: {out}/clips.csv" in capsys.readouterr().out
    assert "num_train: 1" in (out / "config.yaml").read_text()


def test_a_world_without_clips_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not all 0"):
        Options(out=str(tmp_path), num_train=0, num_rpo=0, num_val=0, num_test=0)
    with pytest.raises(InputError, match="no clips"):
        make_demo_world(seed=0, counts={"train": 0}, out=str(tmp_path / "x"), num_workers=0)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from jobs import cli, make_demo_world\n"
        "try: cli.run('make_demo_world', make_demo_world.Options, make_demo_world.main)\n"
        "except SystemExit: pass\n"
        "print('HEAVY', {'torch', 'ray', 'pyarrow', 'av', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--num-train" in done.stdout
    assert "HEAVY set()" in done.stdout
