"""The command makes a file that plays, or says in one line why not."""

from pathlib import Path

import av
import pytest

from jobs import cli
from jobs.generate import Options, main
from pipelines.errors import InputError
from tests.demo_factory import write_demo_video, write_untrained_policy


def parse(*words: str) -> Options:
    return cli.parse("generate", Options, words)


def test_several_candidates_need_a_reward() -> None:
    with pytest.raises(InputError, match="--num-candidates needs --reward"):
        parse("--policy", "p", "--video", "v", "--out", "o", "--num-candidates", "3")


def test_the_command_writes_the_video_with_a_sound_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = write_untrained_policy(tmp_path / "policy")
    video = write_demo_video(tmp_path / "in.mp4", 3.0)
    out = tmp_path / "out.mp4"
    words = ("--policy", str(policy), "--video", str(video), "--out", str(out), "--num-steps", "2", "--guidance", "1")
    assert main(parse(*words)) == 0
    with av.open(str(out)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
    captured = capsys.readouterr()
    assert "3.000 s of sound from 2 windows" in captured.out
    assert "window 2 of 2" in captured.err


def test_a_policy_that_is_not_there_and_unknown_encoders_are_named(tmp_path: Path) -> None:
    video = write_demo_video(tmp_path / "in.mp4")
    words = ("--video", str(video), "--out", str(tmp_path / "out.mp4"))
    with pytest.raises(InputError, match="nothing does not exist"):
        main(parse("--policy", str(tmp_path / "nothing"), *words))
    policy = write_untrained_policy(tmp_path / "policy")
    with pytest.raises(InputError, match="no encoders 'ears'"):
        main(parse("--policy", str(policy), "--encoders", "ears", *words))
    assert not (tmp_path / "out.mp4").exists()
