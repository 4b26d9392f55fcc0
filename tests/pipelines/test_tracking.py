"""Runs as people see them: written through the public API, shipped by the real process, read back with MlflowClient."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.tracking_journal import load_shipped, num_unshipped
from pipelines.tracking_ship import EXPERIMENT, Store, replay, ship_journal

PNG = bytes.fromhex("89504e470d0a1a0a")


def wav_bytes():
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(b"\0\0" * 160)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def no_tracking_server(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", tracking.LAUNCH_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def runs_of(store):
    """Every run of the store by its name; fails when a name occurs twice."""
    found = store.client.search_runs([store.experiment_id()], max_results=100)
    names = [run.info.run_name for run in found]
    assert len(set(names)) == len(names), f"doubled runs: {names}"
    return {run.info.run_name: run for run in found}


def history(store, run, key):
    return [(m.step, m.value) for m in store.client.get_metric_history(run.info.run_id, key)]


def break_off(out):
    with tracking.open_tracker(out, "train_rpo", params={"num_workers": 1}, tags={}) as tracker:
        tracker.metrics(1, {"loss": 1.0})
        raise RuntimeError("a worker died")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A launch with two stages, the second broken off and resumed by the same command, all shipped to SQLite."""
    root = tmp_path_factory.mktemp("tracked") / "runs"
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    patch.delenv(tracking.LAUNCH_VARIABLE, raising=False)
    (root / "a").mkdir(parents=True)
    page = root / "page.html"
    page.write_text("<h1>listen</h1>")
    said = io.StringIO()
    patch.setattr(sys, "stderr", said)
    with tracking.open_launch(
        str(root / "a"), "demo", params={"seed": 1, "password": "pw"}, tags={"code": "0.1"}
    ) as launch:
        with tracking.open_tracker(
            str(root / "a" / "m0"), "train_mmdit", params={"optimizer": {"lr": 0.1}}, tags={"features": "f00"}
        ) as stage:
            for step in range(1, 1201):
                stage.metrics(step, {"loss": 1 / step, "norm": float(step)})
            stage.image("mel/clip", PNG)
            stage.audio("clip", wav_bytes())
            stage.tags({"fingerprint": "abc"})
        with pytest.raises(RuntimeError, match="a worker died"):
            break_off(str(root / "a" / "rpo"))
        with tracking.open_tracker(str(root / "a" / "rpo"), "train_rpo", params={"num_workers": 2}, tags={}) as resumed:
            resumed.metrics(1, {"loss": 1.0})
            resumed.metrics(2, {"loss": 0.5})
        launch.document("report/page.html", page.read_bytes())
    patch.undo()
    return root, said.getvalue()


@pytest.fixture(scope="module")
def store(launched):
    return Store(f"sqlite:///{launched[0] / 'mlflow.db'}")


def test_a_launch_is_one_parent_run_with_a_child_a_stage(store):
    runs = runs_of(store)
    assert set(runs) == {"demo", "train_mmdit", "train_rpo"}
    parent = runs["demo"].info.run_id
    assert {runs[n].data.tags["mlflow.parentRunId"] for n in ("train_mmdit", "train_rpo")} == {parent}
    assert "mlflow.parentRunId" not in runs["demo"].data.tags
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_parameters_lineage_and_late_tags_arrive_and_secrets_do_not(store, launched):
    runs = runs_of(store)
    assert runs["train_mmdit"].data.params == {"optimizer.lr": "0.1"}
    assert {"features": "f00", "fingerprint": "abc"}.items() <= runs["train_mmdit"].data.tags.items()
    assert runs["demo"].data.params == {"seed": "1", "password": "<hidden>"}
    assert "pw" not in (launched[0] / "a" / "journal" / "launch" / "journal.jsonl").read_text()


def test_every_metric_arrives_once_over_many_batches(store):
    runs = runs_of(store)
    assert sorted(history(store, runs["train_mmdit"], "norm")) == [(s, float(s)) for s in range(1, 1201)]
    assert len(history(store, runs["train_mmdit"], "loss")) == 1200


def test_a_resumed_stage_continues_its_run_and_tells_what_changed(store):
    run = runs_of(store)["train_rpo"]
    assert history(store, run, "loss") == [(1, 1.0), (2, 0.5)]
    assert run.data.params["num_workers"] == "1"
    assert run.data.tags["resumed.num_workers"] == "2"


def test_pictures_sounds_and_pages_lie_beside_the_database_and_read_back(store, launched, tmp_path):
    runs = runs_of(store)
    for name, path, content in (
        ("train_mmdit", "images/mel/clip.png", PNG),
        ("train_mmdit", "audio/clip.wav", wav_bytes()),
        ("demo", "report/page.html", b"<h1>listen</h1>"),
    ):
        got = store.client.download_artifacts(runs[name].info.run_id, path, str(tmp_path))
        assert Path(got).read_bytes() == content
    experiment = store.client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    assert experiment.artifact_location == (launched[0] / "mlflow_artifacts").as_uri()


def test_the_last_line_tells_how_to_look_and_the_launch_is_over(launched):
    assert "mlflow ui --backend-store-uri sqlite:///" in launched[1]
    assert tracking.current_launch() is None


def test_replaying_everything_from_the_start_doubles_nothing(store, launched):
    root = launched[0]
    before = {n: (r.info.run_id, len(history(store, r, "loss"))) for n, r in runs_of(store).items()}
    for state in root.rglob("shipped.json"):
        state.unlink()  # killed after the store had everything and before the position was recorded
    assert replay(Store(store.uri), root) == 0
    assert {n: (r.info.run_id, len(history(store, r, "loss"))) for n, r in runs_of(store).items()} == before


def test_a_journal_replays_whole_into_another_store(launched, tmp_path):
    other = Store(f"sqlite:///{tmp_path / 'other.db'}")
    assert replay(other, launched[0]) == 0
    runs = runs_of(other)
    assert runs["train_rpo"].data.tags["mlflow.parentRunId"] == runs["demo"].info.run_id
    assert len(history(other, runs["train_mmdit"], "loss")) == 1200


def test_a_run_that_vanished_from_the_store_is_written_anew(store, launched, tmp_path):
    folder = launched[0] / "a" / "m0" / "journal" / "stage"
    other = Store(f"sqlite:///{tmp_path / 'emptied.db'}")
    state = json.loads((folder / "shipped.json").read_text())
    half = {**state[store.uri], "offset": 1000, "run_id": "0" * 32}
    (folder / "shipped.json").write_text(json.dumps({**state, other.uri: half}))
    assert "0" * 32 in ship_journal(other, folder, orphan=True, status_if_open=None)
    assert ship_journal(other, folder, orphan=True, status_if_open=None) == ""
    assert len(history(other, runs_of(other)["train_mmdit"], "loss")) == 1200


def test_a_child_waits_for_its_parents_run_unless_it_is_an_orphan(launched, tmp_path):
    folder = launched[0] / "a" / "rpo" / "journal" / "stage"
    other = Store(f"sqlite:///{tmp_path / 'child_first.db'}")
    assert "not in the store yet" in ship_journal(other, folder, orphan=False, status_if_open=None)
    assert runs_of(other) == {}
    assert ship_journal(other, folder, orphan=True, status_if_open=None) == ""
    assert "mlflow.parentRunId" not in runs_of(other)["train_rpo"].data.tags


def test_only_rank_zero_writes_a_journal(tmp_path):
    with tracking.open_tracker(str(tmp_path / "s"), "train", params={}, tags={}, rank=1) as tracker:
        tracker.metrics(1, {"loss": 1.0})
        tracker.image("x", PNG)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("out", "store"),
    [
        ("/data/runs/a/round_0/policy", "sqlite:////data/runs/mlflow.db"),
        ("/data/features", "sqlite:////data/mlflow.db"),
    ],
)
def test_the_default_store_lies_in_the_runs_folder_or_beside_the_results(out, store):
    assert tracking.default_store(out) == store


def test_a_dead_server_costs_no_step_and_the_journal_goes_out_later(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    out = tmp_path / "runs" / "s"
    with tracking.open_tracker(str(out), "train", params={}, tags={}) as tracker:
        for step in range(1000):
            tracker.metrics(step, {"loss": 1.0})
    said = capsys.readouterr().err
    assert "1004 records could not be shipped to http://127.0.0.1:9" in said  # and two openings, two closings
    assert f"doctor.py --ship {out}" in said
    written = said + "".join(path.read_text() for path in out.rglob("*") if path.is_file())
    assert "secret" not in written
    later = Store(f"sqlite:///{tmp_path / 'later.db'}")
    assert replay(later, out) == 0
    assert (
        len(
            history(later, next(r for r in later.client.search_runs([later.experiment_id()]) if r.data.metrics), "loss")
        )
        == 1000
    )


WORK = """
import sys, time
from pipelines.tracking import open_tracker
tracker = open_tracker(sys.argv[1], "train", params={}, tags={})
for step in range(50):
    tracker.metrics(step, {"loss": 1.0})
print("written", flush=True)
time.sleep(600)
"""


def test_a_killed_driver_loses_nothing_and_its_run_is_marked_killed(tmp_path):
    out = tmp_path / "runs" / "s"
    driver = subprocess.Popen([sys.executable, "-c", WORK, str(out)], stdout=subprocess.PIPE)
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"written\n"
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    store_uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    journal = out / "journal" / "stage"
    deadline = time.monotonic() + 120
    while num_unshipped(journal, store_uri) or load_shipped(journal, store_uri).run_id is None:
        assert time.monotonic() < deadline, (out / "journal" / "launch" / "ship.log").read_text()
        time.sleep(0.5)
    store = Store(store_uri)
    run = store.client.get_run(str(load_shipped(journal, store_uri).run_id))
    assert len(history(store, run, "loss")) == 50
    while store.client.get_run(run.info.run_id).info.status != "KILLED":
        assert time.monotonic() < deadline
        time.sleep(0.5)
