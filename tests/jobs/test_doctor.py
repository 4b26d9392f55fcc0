import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jobs import doctor
from pipelines import health, tracking
from pipelines.errors import InputError
from pipelines.tracking_journal import num_unshipped

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def answering():
    """A loopback server that answers every GET with the status it was told; remembers the headers it saw."""
    servers = []

    def start(status):
        class Answers(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(dict(self.headers))
                self.send_response(status)
                self.end_headers()

            def log_message(self, format, *args):
                pass

        seen: list[dict] = []
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "verdict"), [(200, "fail"), (401, "ok"), (403, "ok"), (404, "warn")])
def test_a_jobs_api_that_answers_without_a_token_fails(answering, status, verdict, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "must-not-be-sent")
    url, seen = answering(status)
    assert health.check_jobs_api(url).verdict == verdict
    assert "must-not-be-sent" not in str(seen)


def test_no_cluster_is_no_fault():
    assert health.check_jobs_api(NOBODY).verdict == "ok"


@pytest.mark.parametrize(("status", "verdict"), [(200, "ok"), (401, "ok"), (500, "fail")])
def test_an_mlflow_server_has_to_answer(answering, status, verdict):
    url, _ = answering(status)
    assert health.check_tracking(url).verdict == verdict


def test_an_mlflow_server_that_is_away_fails_and_its_password_is_not_shown():
    check = health.check_tracking("http://me:secret@127.0.0.1:9")
    assert check.verdict == "fail"
    assert "secret" not in check.line()


def test_a_token_file_must_be_there_and_private(tmp_path, monkeypatch):
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert health.check_token_file().verdict == "fail"
    token.write_text("x")
    token.chmod(0o644)
    assert "chmod 600" in health.check_token_file().detail
    token.chmod(0o600)
    assert health.check_token_file().verdict == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert health.check_token_file().verdict == "fail"


def test_a_full_disk_and_a_folder_that_is_not_there_yet(tmp_path, monkeypatch):
    assert health.check_disk(tmp_path / "not" / "there" / "yet").verdict in ("ok", "warn", "fail")
    usage = health.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(health.shutil, "disk_usage", lambda place: usage._replace(free=2**30))
    assert health.check_disk(tmp_path).verdict == "fail"
    monkeypatch.setattr(health.shutil, "disk_usage", lambda place: usage._replace(free=10 * 2**30))
    assert health.check_disk(tmp_path).verdict == "warn"


def test_a_library_that_crashes_its_importer_does_not_crash_the_doctor(monkeypatch):
    monkeypatch.setitem(health.LIBRARIES, "broken", "import os; os.abort()")
    monkeypatch.setitem(health.LIBRARIES, "absent", "import no_such_library")
    assert health.check_library("broken").verdict == "fail"
    assert "no_such_library" in health.check_library("absent").detail


def test_the_decoder_and_its_ffmpeg_libraries_are_named():
    detail = health.check_library("av").detail
    assert "FFmpeg" in detail
    assert "libavcodec" in detail


def test_the_exit_code_tells_whether_something_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setattr(health, "LIBRARIES", {"av": health.LIBRARIES["av"]})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    assert doctor.main(doctor.Options(folder=str(tmp_path), dashboard=NOBODY)) == 3
    assert "1 of" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert doctor.main(doctor.Options(folder=str(tmp_path), dashboard=NOBODY)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "doctor: fit"


def test_ship_wants_a_folder(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        doctor.main(doctor.Options(ship=str(tmp_path / "nothing")))


def test_ship_sends_what_an_outage_left_behind(tmp_path, monkeypatch):
    out = tmp_path / "runs" / "a"
    monkeypatch.setattr(tracking, "Shipper", lambda folder, store: None)  # as if it had been killed at once
    with tracking.open_tracker(str(out), "train", params={}, tags={}) as tracker:
        tracker.metrics(1, {"loss": 1.0})
    store = tracking.default_store(str(out))
    journal = tracking.journal_folder(str(out), "stage")
    assert num_unshipped(journal, store) == 3
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "jobs/doctor.py", "--ship", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert num_unshipped(journal, store) == 0
