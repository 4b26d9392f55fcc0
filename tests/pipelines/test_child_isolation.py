"""What the decode child may not do, tried for real in a process that shut itself in."""

import errno
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.data.child_isolation import (
    ABSENT,
    ARCHITECTURES,
    EQUAL,
    FAIL,
    FORBIDDEN,
    RETURN,
    UNKNOWN_TO_US,
    filter_program,
)

ATTEMPTS = """
import json, os, resource, signal, socket, subprocess, sys, threading
from pipelines.data.child_isolation import forbid, isolation

own, other = sys.argv[1:]
told = []
refused = forbid()
attempts = {
    "tcp socket": lambda: socket.socket(),
    "unix socket": lambda: socket.socket(socket.AF_UNIX),
    "socket pair": lambda: socket.socketpair(),
    "program": lambda: subprocess.run(["/bin/true"]),
    "replaced by a program": lambda: os.execv("/bin/true", ["true"]),
    "fork": os.fork,
    "kill another": lambda: os.kill(os.getppid(), 0),
    "limits of another": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU),
    "new file": lambda: open(other, "w"),
    "append": lambda: open(own, "a"),
    "remove": lambda: os.unlink(own),
    "rename": lambda: os.rename(own, other),
    "rights": lambda: os.chmod(own, 0o777),
    "link": lambda: os.symlink(own, other),
    "read a file": lambda: open(own).read(),
    "signal to itself": lambda: os.kill(os.getpid(), 0),
    "a thread": lambda: threading.Thread(target=told.append, args=(1,)).start(),
    "own limits": lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
}
results = {}
for name, attempt in attempts.items():
    try:
        attempt()
        results[name] = 0
    except OSError as error:
        results[name] = error.errno
print(json.dumps({"refused": refused, "isolation": isolation(), "results": results}))
"""
ALLOWED = {"read a file", "signal to itself", "a thread", "own limits"}


@pytest.mark.skipif(platform.machine() not in ARCHITECTURES, reason="no filter for this processor")
def test_network_programs_processes_and_changes_to_files_are_refused_and_reading_is_not(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("kept")
    command = [sys.executable, "-c", ATTEMPTS, str(own), str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    answer = json.loads(done.stdout)
    assert answer["refused"] is None
    assert answer["isolation"] == {"filter": True, "no_new_privileges": True}
    expected = {name: 0 if name in ALLOWED else errno.EPERM for name in answer["results"]}
    assert answer["results"] == expected
    assert own.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_every_forbidden_call_fails_by_its_number_and_no_jump_leaves_the_filter(machine: str) -> None:
    audit, column = ARCHITECTURES[machine]
    program = filter_program(audit, column, 4242)
    assert len(program) < 4096
    assert program[-1][0] == RETURN
    for index, (code, yes, no, _) in enumerate(program):
        assert code == RETURN or index + 1 + max(yes, no) < len(program)
    numbers = [calls[name][column] for calls in (FORBIDDEN, UNKNOWN_TO_US) for name in calls]
    known = [number for number in numbers if number != ABSENT]
    assert len(set(known)) == len(known)
    for number in known:
        place = program.index((EQUAL, 0, 1, number))
        code, _, _, result = program[place + 1]
        assert code == RETURN
        assert result & 0xFFFF0000 == FAIL
