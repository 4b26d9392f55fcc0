"""The decode child: killed, crashing, hanging, lying and greedy children cost a clip at most."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.decoding import DecodeLimits, Decoder, child_command
from pipelines.data.window import FrameGrid, WindowRequest
from pipelines.errors import MediaError
from tests.pipelines.clip_factory import simple_clip

GRID = FrameGrid(rate_hz=16, size_px=24, fit="stretch", num_frames=32)
REQUEST = WindowRequest(
    start_s=0.0, duration_s=2.0, grids=(GRID,), audio_rate_hz=16_000, audio_samples=32_000, max_pixels=1 << 22
)
REPLY = (
    "import sys,struct,json\n"
    "def reply(h, body=b''):\n"
    "    h=json.dumps(h).encode()\n"
    "    sys.stdout.buffer.write(struct.pack('<I',len(h))+h+body); sys.stdout.buffer.flush()\n"
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simple_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


def child(code: str) -> list[str]:
    return [sys.executable, "-c", REPLY + code]


def reason(decoder: Decoder, path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        decoder.decode(path, REQUEST)
    return caught.value.reason


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_child_serves_clip_after_clip_and_is_replaced_after_some(clip: Path) -> None:
    with Decoder(DecodeLimits(clips_per_child=2)) as decoder:
        pids, windows = [], []
        for _ in range(3):
            windows.append(decoder.decode(clip, REQUEST))
            pids.append(decoder.child_pid)
    assert pids[0] == pids[1] != pids[2]
    first = windows[0]
    assert first.frames[0].shape == (32, 24, 24, 3)
    assert first.audio is not None
    assert first.valid_s == 2.0
    for other in windows[1:]:
        np.testing.assert_array_equal(first.frames[0], other.frames[0])
        np.testing.assert_array_equal(first.audio, other.audio)  # pyright: ignore[reportArgumentType]
    assert decoder.child_pid is None


def test_a_child_killed_between_or_during_clips_is_replaced(clip: Path) -> None:
    with Decoder() as decoder:
        expected = decoder.decode(clip, REQUEST)
        first = decoder.child_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        np.testing.assert_array_equal(decoder.decode(clip, REQUEST).frames[0], expected.frames[0])
        second = decoder.child_pid
        assert second not in (None, first)
        # Stopped, so that the kill certainly falls into the clip.
        os.kill(int(second or 0), signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (int(second or 0), signal.SIGKILL)).start()
        np.testing.assert_array_equal(decoder.decode(clip, REQUEST).frames[0], expected.frames[0])


def test_a_clip_that_kills_its_child_twice_is_a_decoder_crash_and_the_next_is_served(clip: Path) -> None:
    tally = clip.parent / "crashes"
    code = (
        f"import os\nfor line in sys.stdin:\n    open({str(tally)!r},'a').write('x')\n"
        "    os.kill(os.getpid(), 11) if 'deadly' in line else reply({'reason':'silent','detail':'alive'})\n"
    )
    with Decoder(command=child(code)) as decoder:
        assert reason(decoder, clip.with_name("deadly.mp4")) == "decoder_crash"
        assert tally.read_text() == "xx"
        assert reason(decoder, clip) == "silent"


def test_a_hanging_child_is_killed_and_the_next_clip_is_served(clip: Path) -> None:
    code = (
        "import time\nfor line in sys.stdin:\n"
        "    time.sleep(60) if 'hang' in line else reply({'reason':'silent','detail':'alive'})\n"
    )
    with Decoder(DecodeLimits(timeout_s=0.7), command=child(code)) as decoder:
        assert reason(decoder, clip) == "silent"
        pid = decoder.child_pid
        assert reason(decoder, clip.with_name("hang.mp4")) == "timeout"
        assert not alive(pid or 0)
        assert reason(decoder, clip) == "silent"


def test_a_stopped_child_is_a_hang_too(clip: Path) -> None:
    with Decoder(DecodeLimits(timeout_s=3.0)) as decoder:
        expected = decoder.decode(clip, REQUEST)
        os.kill(int(decoder.child_pid or 0), signal.SIGSTOP)
        np.testing.assert_array_equal(decoder.decode(clip, REQUEST).frames[0], expected.frames[0])


@pytest.mark.parametrize(
    "code",
    [
        "sys.stdin.readline(); sys.stdout.write('x' * 4096); sys.stdout.flush(); sys.stdin.read()",
        "sys.stdin.readline(); sys.stdout.buffer.write(b'\\3\\0\\0\\0no!'); sys.stdout.flush(); sys.stdin.read()",
        "sys.stdin.readline(); reply({'valid_s': 2.0, 'audio_rate_hz': 10**9, 'audio_margin': 0}); sys.stdin.read()",
        "sys.stdin.readline(); reply({'valid_s': 2.0}); sys.stdin.read()",
        "sys.stdin.readline(); reply([1]); sys.stdin.read()",
        "sys.stdin.readline(); reply({'valid_s': 2.0, 'audio_rate_hz': 16000, 'audio_margin': 0}, b'short')",
    ],
)
def test_a_child_that_answers_nonsense_counts_as_crashed(clip: Path, code: str) -> None:
    with Decoder(DecodeLimits(timeout_s=20.0), command=child(code)) as decoder:
        assert reason(decoder, clip) == "decoder_crash"


def test_a_clip_that_wants_too_much_memory_is_too_large_or_a_crash_and_the_parent_lives(clip: Path) -> None:
    # Enough to start in, not enough for the frames that are asked for.
    greedy = WindowRequest(
        start_s=0.0,
        duration_s=2.0,
        grids=(FrameGrid(rate_hz=1000, size_px=1024, fit="stretch", num_frames=2000),),
        audio_rate_hz=16_000,
        audio_samples=0,
        max_pixels=1 << 22,
    )
    with Decoder(DecodeLimits(memory_bytes=1 << 30)) as decoder:
        with pytest.raises(MediaError) as caught:
            decoder.decode(clip, greedy)
        assert caught.value.reason == "too_large"
        assert decoder.decode(clip, REQUEST).valid_s == 2.0


def test_the_child_has_limits_and_sees_no_secrets(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do not tell")
    with Decoder() as decoder:
        decoder.decode(clip, REQUEST)
        pid = int(decoder.child_pid or 0)
        assert b"do not tell" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (32, 32)
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (4 << 30, 4 << 30)
        assert 0 < resource.prlimit(pid, resource.RLIMIT_CPU)[0] <= 70


def test_the_child_ends_with_its_parent(clip: Path) -> None:
    code = (
        "import sys, time\nfrom pipelines.data.decoding import Decoder\n"
        "from tests.pipelines.test_decoding import REQUEST\n"
        f"d = Decoder(); d.decode({str(clip)!r}, REQUEST); print(d.child_pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_files_with_any_name_are_opened(tmp_path: Path, clip: Path) -> None:
    with Decoder() as decoder:
        for name in (
            b"plain.mp4",
            b"two\nlines \"quoted\" 'x'.mp4",
            b"bytes\xff\xfe.mp4",
            "émoji😀.mp4".encode(),
            b"concat:a|b",
        ):
            target = os.fsencode(tmp_path) + b"/" + name
            Path(os.fsdecode(target)).write_bytes(clip.read_bytes())
            assert decoder.decode(os.fsdecode(target), REQUEST).valid_s == 2.0
        assert reason(decoder, tmp_path / "absent.mp4") == "missing"


def test_the_command_line_starts_the_child_without_the_working_folder_on_its_path() -> None:
    assert child_command(DecodeLimits())[1:4] == ["-P", "-m", "pipelines.data.decode_child"]


def test_the_child_says_that_it_is_shut_in(clip: Path) -> None:
    with Decoder() as decoder:
        decoder.decode(clip, REQUEST)
        assert decoder.isolation() == {"filter": True, "no_new_privileges": True}
