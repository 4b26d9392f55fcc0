"""One writer a folder: real processes that run at once, are killed, are stopped and wake up, under any clock."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipelines.data.lease import LEASE_FOLDER, acquire
from pipelines.data.storage import Folder, open_folder
from pipelines.errors import EnvironmentFailed, StageConflict
from tests.lease_holder import Holder
from tests.storage_servers import Faults, broken_s3, s3, s3_address

__all__ = ["broken_s3", "s3", "s3_address"]
RENEW_S = 0.2
PATIENT_S = 5.0
"""Of those who are to be refused: they watch for so long that no busy machine makes the holder look dead."""
DAY_S = 86_400.0
NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder of either storage."""
    if request.param == "local":
        return open_folder(tmp_path / "out")
    return open_folder(f"{request.getfixturevalue('s3')}/out")


def record(folder: Folder, number: int) -> dict[str, object]:
    return json.loads(folder.read_bytes(f"{LEASE_FOLDER}/{number:06d}.json"))


def renewed(folder: Folder, number: int) -> None:
    """Wait until a holder has renewed its lease once more."""
    before = record(folder, number)["renewals"]
    while record(folder, number)["renewals"] == before:
        time.sleep(0.01)


def test_fault_33_of_two_jobs_that_write_one_folder_the_second_is_told_who_has_it(folder: Folder) -> None:
    with Holder(folder.uri, RENEW_S) as first:
        assert first.hear() == "held 1"
        with pytest.raises(StageConflict) as caught:
            acquire(folder, lambda line: None, renew_s=PATIENT_S)
        message = str(caught.value)
        for part in (folder.uri, f"process {first.process.pid}", os.uname().nodename, "lease_holder.py", "lease 1"):
            assert part in message
        assert "launch spring-corpus" in message
        assert "give another folder" in message
        # The refused one has left no trace, and the first goes on.
        assert folder.list_names(LEASE_FOLDER) == ["000001.json"]
        assert first.ask("commit first") == "done"
        assert first.ask("release") == "ended"
    said: list[str] = []
    with acquire(folder, said.append, renew_s=RENEW_S) as lease:
        assert (lease.number, said) == (2, [])
        assert folder.list_names(LEASE_FOLDER) == ["000002.json"]
    assert record(folder, 2)["state"] == "released"


def test_fault_33_of_processes_that_start_at_once_exactly_one_gets_the_folder(s3: str) -> None:
    folder = open_folder(f"{s3}/out")
    holders = [Holder(folder.uri, 1.0) for _ in range(3)]
    try:
        heard = sorted(holder.hear() for holder in holders)
        assert heard[0].startswith("held ")
        assert all(line.startswith(f"refused: {folder.uri} is being written by") for line in heard[1:])
    finally:
        for holder in holders:
            holder.__exit__(None, None, None)


def test_what_a_killed_process_of_this_machine_held_is_taken_over_at_once(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "out")
    # Its interval is an hour: whoever waited for its renewals would wait for four.
    with Holder(folder.uri, 3600.0) as first:
        assert first.hear() == "held 1"
        first.process.send_signal(signal.SIGKILL)
        # Not waited for yet: a zombie still has its id.
        os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)
        with acquire(folder, lambda line: None, renew_s=3600.0) as second:
            assert second.number == 2
        first.process.wait()
        assert acquire(folder, lambda line: None, renew_s=3600.0).number == 3


def test_fault_33_a_stopped_holder_that_wakes_up_after_a_takeover_cannot_finish(folder: Folder) -> None:
    with Holder(folder.uri, RENEW_S) as first:
        assert first.hear() == "held 1"
        first.process.send_signal(signal.SIGSTOP)
        said: list[str] = []
        with acquire(folder, said.append, renew_s=RENEW_S) as second:
            assert second.number == 2
            assert "watching" in said[0]
            assert "was not renewed" in said[1]
            first.process.send_signal(signal.SIGCONT)
            answer = first.ask("commit first")
            assert answer.startswith(f"conflict: {folder.uri} was taken over from lease 1 by ")
            assert f"process {os.getpid()}" in answer
            second.check()
            folder.write_bytes("manifest.json", b"second", only_if_absent=True)
            # Nor does giving back what it has lost disturb the new holder.
            assert first.ask("release") == "ended"
            second.check()
    assert folder.read_bytes("manifest.json") == b"second"
    assert folder.list_names(LEASE_FOLDER) == ["000002.json"]


def test_a_holder_elsewhere_is_watched_and_not_judged_by_its_process_id(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], check=False).returncode:
        pytest.skip("no new process namespace may be made here (unshare --user --pid)")
    folder = open_folder(tmp_path / "out")
    with Holder(folder.uri, RENEW_S, prefix=NAMESPACE) as first:
        assert first.hear() == "held 1"
        # Its process 1 is not ours.
        assert record(folder, 1)["owner"]["pid"] != first.process.pid  # pyright: ignore[reportIndexIssue]
        with pytest.raises(StageConflict):
            acquire(folder, lambda line: None, renew_s=PATIENT_S)
        first.process.kill()
        first.process.wait()
        said: list[str] = []
        assert acquire(folder, said.append, renew_s=RENEW_S).number == 2
        assert "was not renewed" in said[-1]


def test_fault_34_clocks_that_are_a_day_wrong_change_neither_order_nor_holder(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "out")

    def age(by_s: float) -> None:
        for path in (tmp_path / "out" / LEASE_FOLDER).iterdir():
            os.utime(path, (time.time() + by_s, time.time() + by_s))

    with Holder(folder.uri, RENEW_S, shift_s=DAY_S) as first:
        assert first.hear() == "held 1"
        age(DAY_S)
        with Holder(folder.uri, PATIENT_S, shift_s=-DAY_S) as second:
            assert second.hear().startswith("refused")
        renewed(folder, 1)
        # Stopped, its file looks a day old, or a day ahead; only that it does not change counts.
        first.process.send_signal(signal.SIGSTOP)
        age(DAY_S)
        with Holder(folder.uri, RENEW_S, shift_s=-DAY_S) as second:
            assert second.hear() == "held 2"
            age(-DAY_S)
            first.process.send_signal(signal.SIGCONT)
            assert first.ask("check").startswith("conflict")
            assert second.ask("commit second") == "done"


def test_a_lease_is_given_back_when_its_block_raises_and_the_cause_is_kept(folder: Folder) -> None:
    with pytest.raises(KeyError, match="boom"), acquire(folder, renew_s=RENEW_S):
        raise KeyError("boom")
    assert record(folder, 1)["state"] == "released"


def test_a_lease_file_that_cannot_be_read_is_watched_and_then_replaced(folder: Folder) -> None:
    for content in (b"", b"{", b'{"owner": {}}'):
        folder.write_bytes(f"{LEASE_FOLDER}/000007.json", content)
        said: list[str] = []
        with acquire(folder, said.append, renew_s=0.02) as lease:
            assert lease.number == 8
            assert "held by an unknown process" in said[0]
        folder.delete(f"{LEASE_FOLDER}/000008.json")


def test_a_holder_that_cannot_reach_storage_for_a_while_keeps_its_lease(
    broken_s3: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.data.storage_faults.ATTEMPTS", 2)
    uri, faults = broken_s3
    folder = open_folder(f"{uri}/out")
    said: list[str] = []
    with acquire(folder, said.append, renew_s=0.05) as lease:
        faults.inject("503", 6, method="PUT")
        while faults.injected < 6:
            time.sleep(0.01)
        renewed(folder, 1)
        lease.check()
    assert any("could not be renewed" in line for line in said)
    assert record(folder, 1)["state"] == "released"


def test_a_store_that_ignores_conditions_is_refused_before_any_work(broken_s3: tuple[str, Faults]) -> None:
    uri, faults = broken_s3
    faults.inject("unconditional", 1000, method="PUT")
    with pytest.raises(EnvironmentFailed, match="ignores conditional writes"):
        acquire(open_folder(f"{uri}/out"), renew_s=RENEW_S)
