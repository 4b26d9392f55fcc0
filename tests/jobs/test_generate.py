"""The command makes a file that plays, or says in one line why not; its memory does not grow with the length."""

import re
import subprocess
import sys
from pathlib import Path

import av
import pytest

from jobs import cli
from jobs.generate import Options, main
from pipelines.errors import InputError
from tests.demo_factory import write_demo_video, write_untrained_policy
from tests.pipelines.clip_factory import grey_frames, write_clip

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--num-steps", "1", "--guidance", "1")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_policy(tmp_path_factory.mktemp("models") / "policy")


def parse(*words: str) -> Options:
    return cli.parse("generate", Options, words)


def test_several_candidates_need_a_reward() -> None:
    with pytest.raises(InputError, match="--num-candidates needs --reward"):
        parse("--policy", "p", "--video", "v", "--out", "o", "--num-candidates", "3")


def test_the_command_writes_the_video_with_a_sound_and_says_so(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_demo_video(tmp_path / "in.mp4", 3.0)
    out = tmp_path / "out.mp4"
    words = ("--policy", str(policy), "--video", str(video), "--out", str(out), *QUICK)
    assert main(parse(*words)) == 0
    with av.open(str(out)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
    captured = capsys.readouterr()
    assert "3.000 s of sound from 2 windows" in captured.out
    assert re.search(r"^peak memory: conditions, latents, sound \d+ MiB$", captured.out, re.MULTILINE)
    assert "sound: window 2 of 2" in captured.err
    assert main(parse(*words, "--offload")) == 0
    captured = capsys.readouterr()
    assert re.search(r"^peak memory: conditions \d+ MiB; latents \d+ MiB; sound \d+ MiB$", captured.out, re.MULTILINE)
    assert "conditions: window 1 of 2" in captured.err


def test_words_become_a_sound_without_a_video(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.wav"
    words = ("--policy", str(policy), "--out", str(out), "--duration-s", "2", "--prompt", "a bell")
    assert main(parse(*words, "--negative-prompt", "rain", "--num-steps", "1", "--bf16")) == 0
    assert "2.000 s of sound from 1 window\n" in capsys.readouterr().out
    with av.open(str(out)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == 32_000


def test_a_policy_that_is_not_there_and_unknown_encoders_are_named(policy: Path, tmp_path: Path) -> None:
    video = write_demo_video(tmp_path / "in.mp4")
    words = ("--video", str(video), "--out", str(tmp_path / "out.mp4"))
    with pytest.raises(InputError, match="nothing does not exist"):
        main(parse("--policy", str(tmp_path / "nothing"), *words))
    with pytest.raises(InputError, match="no encoders 'ears'"):
        main(parse("--policy", str(policy), "--encoders", "ears", *words))
    assert not (tmp_path / "out.mp4").exists()


def peak_mib(policy: Path, video: Path, out: Path, *words: str) -> list[int]:
    """What a process of its own says of its peak memory."""
    command = [sys.executable, "jobs/generate.py", "--policy", str(policy), "--video", str(video), "--out", str(out)]
    done = subprocess.run([*command, *QUICK, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(found) for found in re.findall(r"(\d+) MiB", done.stdout)]


def flat_video(path: Path, seconds: int) -> Path:
    return write_clip(path, grey_frames(i % 200 for i in range(4 * seconds)), None, frame_rate=4)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--offload",)], ids=["together", "offload"])
def test_ten_minutes_take_as_much_memory_as_ten_seconds(policy: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    peaks = []
    for seconds in (10, 600):
        video = flat_video(tmp_path / f"{seconds}.mp4", seconds)
        peaks.append(peak_mib(policy, video, tmp_path / f"out{seconds}.mp4", *words))
        with av.open(str(tmp_path / f"out{seconds}.mp4")) as container:
            stream = container.streams.audio[0]
            assert float(stream.duration * stream.time_base) == pytest.approx(seconds, abs=0.064)
    assert len(peaks[0]) == len(peaks[1]) == (3 if words else 1)
    # Most of it are the libraries: held whole, ten minutes of sound would add 37 MiB to it.
    assert all(long < min(1.2 * short, short + 16) for short, long in zip(*peaks, strict=True)), peaks
