"""The command prints R, its parts and the best offset, for people and for programs."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs import cli
from jobs.score import Options, main
from pipelines.data.media_write import wav_bytes
from pipelines.errors import InputError
from tests.demo_factory import write_demo_video, write_untrained_policy, write_untrained_reward


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_untrained_reward(tmp_path_factory.mktemp("reward") / "reward"))


def run(*words: str) -> int:
    return main(cli.parse("score", Options, words))


def test_text_and_json_tell_the_same(reward: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = str(write_demo_video(tmp_path / "clip.mp4"))
    assert run("--reward", reward, "--video", video) == 0
    text = capsys.readouterr().out
    assert run("--reward", reward, "--video", video, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert f"R {found['total']:+.3f}" in text
    assert f"best offset {found['offset_s']:+.3f} s" in text
    assert len(found["windows"]) == 1


def test_a_long_file_gives_a_line_a_window_and_the_worst(
    reward: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--reward", reward, "--video", str(write_demo_video(tmp_path / "long.mp4", 5.0))) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("mean R")
    assert "worst window" in lines[2]


def test_a_silent_sound_is_refused_in_words(reward: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = str(write_demo_video(tmp_path / "clip.mp4"))
    (tmp_path / "silence.wav").write_bytes(wav_bytes(np.zeros(40_000, np.float32), 16_000))
    assert run("--reward", reward, "--video", video, "--audio", str(tmp_path / "silence.wav")) == 0
    assert "refused, the sound is silent" in capsys.readouterr().out


def test_a_policy_given_as_reward_is_named(tmp_path: Path) -> None:
    video = str(write_demo_video(tmp_path / "clip.mp4"))
    with pytest.raises(InputError, match="is not a reward"):
        run("--reward", str(write_untrained_policy(tmp_path / "policy")), "--video", video)
