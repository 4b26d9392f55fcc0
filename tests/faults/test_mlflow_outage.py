"""A real MLflow server on loopback: read back, killed in mid-run and started again, and one that fails after acting."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.tracking_ship import Store

pytestmark = pytest.mark.slow
START_LIMIT_S = 300


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`mlflow server` on SQLite and loopback; can be killed and started again on the same port and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--workers",
            "1",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
                env={**environment, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.5)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.delenv(tracking.LAUNCH_VARIABLE, raising=False)
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    died = None if server.process is None else server.process.poll()
    server.kill()
    assert died is None, f"the server ended by itself or by somebody else's hand, with {died}"


def runs_by_name(store):
    found = store.client.search_runs([store.experiment_id()], max_results=100)
    names = [run.info.run_name for run in found]
    assert len(set(names)) == len(names), f"doubled runs: {names}"
    return {run.info.run_name: run for run in found}


def steps_of(store, run, key):
    return sorted((m.step, m.value) for m in store.client.get_metric_history(run.info.run_id, key))


def test_runs_read_back_from_a_real_server(server, tmp_path):
    out = tmp_path / "runs" / "a"
    with (
        tracking.open_launch(str(out), "demo", params={"seed": 1}, tags={"code": "0.1"}),
        tracking.open_tracker(str(out / "m0"), "train_mmdit", params={"lr": 0.1}, tags={"features": "f00"}) as stage,
    ):
        for step in range(700):
            stage.metrics(step, {"loss": 1 / (step + 1)})
        stage.image("clip", b"\x89PNG")
    store = Store(server.uri)
    runs = runs_by_name(store)
    child = runs["train_mmdit"]
    assert child.data.tags["mlflow.parentRunId"] == runs["demo"].info.run_id
    assert (child.data.params, child.data.tags["features"], child.info.status) == ({"lr": "0.1"}, "f00", "FINISHED")
    assert steps_of(store, child, "loss") == [(step, 1 / (step + 1)) for step in range(700)]
    got = store.client.download_artifacts(child.info.run_id, "images/clip.png", str(tmp_path))
    assert Path(got).read_bytes() == b"\x89PNG"
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_a_server_killed_in_mid_run_and_started_again_loses_and_doubles_no_step(server, tmp_path):
    out = tmp_path / "runs" / "a"
    with tracking.open_tracker(str(out), "train", params={"lr": 0.1}, tags={}) as tracker:
        shipped = out / "journal" / "stage" / "shipped.json"
        for step in range(600):
            tracker.metrics(step, {"loss": float(step)})
            if step == 200:
                wait_until(shipped.is_file)
                server.kill()
            if step == 400:
                time.sleep(5)  # long enough for tries that fail
                server.start()
    store = Store(server.uri)
    found = store.client.search_runs([store.experiment_id()], "tags.`multisoundgen.kind` = 'stage'")
    assert len(found) == 1
    assert steps_of(store, found[0], "loss") == [(step, float(step)) for step in range(600)]


def wait_until(condition):
    deadline = time.monotonic() + START_LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


class ActsThenFails(http.server.BaseHTTPRequestHandler):
    """Forwards every request; answers every third write with 500 although it has been done."""

    target = ""
    writes = 0

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        request = urllib.request.Request(self.target + self.path, body, headers, method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        if self.command != "GET" and not self.path.endswith("/search"):
            type(self).writes += 1
            if type(self).writes % 3 == 1:
                status, content = 500, b'{"error_code": "INTERNAL_ERROR", "message": "after the fact"}'
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = forward

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def test_a_server_that_acts_and_then_answers_500_doubles_nothing(server, tmp_path, monkeypatch):
    handler = type("Handler", (ActsThenFails,), {"target": server.uri, "writes": 0})
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.server_address[1]}")
    out = tmp_path / "runs" / "a"
    with (
        tracking.open_launch(str(out), "demo", params={}, tags={}),
        tracking.open_tracker(str(out / "s"), "train", params={"lr": 0.1}, tags={}) as tracker,
    ):
        for step in range(1500):
            tracker.metrics(step, {"loss": float(step)})
        tracker.audio("clip", b"RIFF")
    proxy.shutdown()
    proxy.server_close()
    assert handler.writes > 6
    store = Store(server.uri)
    runs = runs_by_name(store)
    assert set(runs) == {"demo", "train"}
    assert steps_of(store, runs["train"], "loss") == [(step, float(step)) for step in range(1500)]
    assert runs["train"].data.params == {"lr": "0.1"}
