"""Line 21 for the decode child: stopped or killed while it has the clip open, and the row is the same."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.faults.media_faults import made, outcomes
from tests.pipelines.clip_factory import tone, write_clip


def children_that_read(path: Path) -> list[int]:
    """Processes of this one that hold `path` open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(") ")[2].split()[1]) != os.getpid():
                continue
            if any(entry.readlink() == path for entry in (folder / "fd").iterdir()):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@contextmanager
def struck(path: Path, number: signal.Signals) -> Iterator[list[int]]:
    """The first child that is found with `path` open gets the signal; the list says which."""
    hit: list[int] = []
    over = threading.Event()

    def strike() -> None:
        while not over.is_set() and not hit:
            for pid in children_that_read(path):
                os.kill(pid, number)
                hit.append(pid)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield hit
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_fault_21_a_decode_child_struck_inside_a_clip_changes_no_row(tmp_path: Path, number: signal.Signals) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    rng = np.random.default_rng(21)
    # Noise of this size takes the decoder long enough to be met at work.
    noise = [rng.integers(0, 255, (240, 320, 3), np.uint8) for _ in range(65)]
    path = write_clip(clips / "noise.mp4", noise, tone(2.6, 16_000), rate_hz=16_000)
    quiet = made(clips)
    with struck(path, number) as hit:
        stormy = made(clips, timeout_s=4.0, out="struck")
    assert hit
    assert outcomes(stormy) == {"noise": "row"}
    assert stormy.digest == quiet.digest
    with pytest.raises(ProcessLookupError):
        os.kill(hit[0], 0)
