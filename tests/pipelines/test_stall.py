"""Which rank hangs, told from what the book hears; and that a rank which hangs is really ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.training.stall import Place, Pulse, Stall, StallBoard, beat_s

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0


def _board(places: dict[int, Place], silent: tuple[int, ...] = (), until_s: float = 100.0) -> StallBoard:
    """A board that heard of each rank at its place every second; of the silent ones only at first."""
    board = StallBoard(LIMIT_S)
    for second in range(int(until_s) + 1):
        for rank, place in places.items():
            if second == 0 or rank not in silent:
                board.hear(rank, place, float(second))
    return board


def test_fault_25_the_rank_that_is_furthest_behind_is_named_and_not_those_that_wait_for_it() -> None:
    waiting, stuck = Place(71, 11, "backward"), Place(69, 11, "data")
    board = _board({0: waiting, 1: stuck, 2: waiting})
    assert board.stall(100.0) == Stall({1: stuck}, waiting)
    assert board.hear(1, stuck, 101.0)
    assert not board.hear(0, waiting, 101.0)
    assert Stall({1: stuck}, waiting).line(LIMIT_S) == (
        "rank 1 (last heard from in step 12, data) made no progress for 60 s in step 12, where the others wait "
        "(backward): it is ended, and the group starts again"
    )


def test_fault_25_of_ranks_at_one_place_the_one_that_fell_silent_is_named() -> None:
    place = Place(71, 11, "backward")
    board = _board({0: place, 1: place, 2: place}, silent=(2,))
    assert board.stall(100.0) == Stall({2: place}, place)
    board = _board({0: Place(60, 9, "data"), 1: Place(70, 11, "forward")}, silent=(0,))
    # Told with the step of those that wait: a silent rank's own last word is old.
    assert board.stall(100.0) == Stall({0: Place(60, 9, "data")}, Place(70, 11, "forward"))


def test_ranks_of_which_none_is_behind_are_named_together() -> None:
    place = Place(5, 0, "backward")
    assert _board({0: place, 1: place}).stall(100.0) == Stall({0: place, 1: place}, None)


def test_a_rank_that_moves_slowly_is_not_named_though_others_wait_long_for_it() -> None:
    board = StallBoard(LIMIT_S)
    for second in range(200):
        board.hear(0, Place(900, 11, "metrics"), float(second))
        board.hear(1, Place(60 + second // 50, 11, "validation"), float(second))
        assert board.stall(float(second)) is None


def test_nobody_is_named_before_the_limit_or_once_nobody_is_waited_for() -> None:
    place = Place(5, 0, "forward")
    assert _board({0: place, 1: place}, silent=(1,), until_s=59).stall(59.0) is None
    board = _board({0: place, 1: place}, silent=(1,), until_s=59)
    board.hear(0, None, 59.5)
    board.hear(1, None, 59.5)
    assert board.stall(1000.0) is None
    assert StallBoard(LIMIT_S).stall(1000.0) is None


def test_who_was_named_stays_named() -> None:
    place = Place(5, 0, "forward")
    board = _board({0: place, 1: place}, silent=(1,))
    named = board.stall(100.0)
    assert named is not None
    board.hear(1, Place(9, 1, "data"), 101.0)
    assert board.stall(102.0) == named


def test_a_pulse_counts_the_marks_and_rests() -> None:
    pulse = Pulse()
    assert pulse.place is None
    pulse.at(0, "data")
    pulse.at(0, "forward")
    assert pulse.place == Place(2, 0, "forward")
    pulse.rest()
    assert pulse.place is None
    assert beat_s(1800.0) == 10.0
    assert beat_s(6.0) == 1.0


HEART = """
import os, signal, sys, time
from pipelines.training.stall import Heart, Pulse
def tell(place):
    if answer == "error":
        raise TimeoutError("the book is away")
    return answer == "ended" and place is not None
answer, ending = sys.argv[1:]
pulse = Pulse()
pulse.at(3, "forward")
heart = Heart(1, pulse, 0.6, tell)
if ending == "sleep":
    time.sleep(60)
if ending == "stop":
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(2.0)
heart.close()
"""


@pytest.mark.parametrize(
    ("answer", "ending", "code"),
    [
        ("ended", "sleep", -signal.SIGKILL),
        ("fine", "stop", -signal.SIGKILL),
        ("fine", "close", 0),
        ("error", "close", 0),
    ],
)
def test_a_rank_is_ended_when_it_is_told_so_or_is_stopped_and_not_while_its_heart_beats(
    answer: str, ending: str, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HEART, answer, ending],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    assert process.wait(timeout=40) == code
