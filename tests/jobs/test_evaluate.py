"""The command: wrong options are one line and exit 2 before anything is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from jobs.evaluate import Options
from pipelines.errors import InputError

NEEDED = ("--reward", "r", "--features", "f", "--out", "o")


def parse(*words: str) -> Options:
    return cli.parse("evaluate", Options, words)


def test_a_policy_is_needed_only_where_something_is_sampled() -> None:
    assert parse(*NEEDED, "--policy", "p").subject == "policy"
    assert parse(*NEEDED, "--subject", "ground_truth").policy is None
    for subject in ("policy", "shuffled"):
        with pytest.raises(InputError, match="--policy is missing"):
            parse(*NEEDED, "--subject", subject)


def test_senseless_numbers_are_refused_by_name() -> None:
    for words in (("--num-candidates", "0"), ("--num-steps", "0"), ("--max-clips", "0"), ("--num-workers", "-1")):
        with pytest.raises(InputError, match=words[0]):
            parse(*NEEDED, "--policy", "p", *words)
    with pytest.raises(InputError, match="one sound a clip"):
        parse(*NEEDED, "--subject", "inverted", "--num-candidates", "4")


def test_the_resolved_options_give_themselves_back(tmp_path: Path) -> None:
    options = parse(*NEEDED, "--policy", "p", "--num-candidates", "5", "--split", "val")
    (tmp_path / "config.yaml").write_text(cli.to_yaml("evaluate", options))
    assert parse(str(tmp_path / "config.yaml")) == options


def test_an_input_that_is_not_there_is_one_line_and_exit_2(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/evaluate.py", "--subject", "ground_truth", "--num-workers", "0"]
    places = ["--reward", str(tmp_path / "r"), "--features", str(tmp_path / "f"), "--out", str(tmp_path / "o")]
    done = subprocess.run([*command, *places], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("evaluate: ")
    assert f"{tmp_path / 'f'} does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()
