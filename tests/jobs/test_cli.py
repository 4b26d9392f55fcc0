import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from jobs import cli
from pipelines.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """An example job."""

    out: cli.StoragePath
    """Where."""
    steps: int = 3
    """How many."""
    mode: Literal["fast", "slow"] = "fast"
    """How."""
    scores: tuple[cli.StoragePath, ...] = ()
    """Scores."""
    init: cli.StoragePath | None = None
    """A checkpoint."""
    strict: bool = True
    """Whether to be strict."""

    def __post_init__(self) -> None:
        cli.require(self.steps > 0, f"--steps must be positive, got {self.steps}")


def parse(*words: str) -> Example:
    return cli.parse("example", Example, words)


def test_flags_after_a_preset_win_and_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    preset = tmp_path / "mine.yaml"
    preset.write_text("example: {steps: 7, mode: slow, strict: false, scores: [a, s3://b/c]}\n")
    options = parse(str(preset), "--steps", "9", "--out", "x/../y")
    assert options == Example(
        out=f"{tmp_path}/y", steps=9, mode="slow", strict=False, scores=(f"{tmp_path}/a", "s3://b/c")
    )


def test_the_resolved_options_reload_equal(tmp_path: Path) -> None:
    options = parse("--out", "o", "--scores", "odd name", "b", "--no-strict", "--init=None")
    saved = tmp_path / "config.yaml"
    saved.write_text(cli.to_yaml("example", options))
    assert parse(str(saved)) == options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "o", "--stepz", "3"], "Unrecognized options: --stepz"),
        (["--out", "o", "--steps", "many"], "--steps: invalid literal"),
        (["--out", "o", "--steps", "0"], "--steps must be positive, got 0"),
        (["--out", "o", "--mode", "medium"], "medium"),
        ([], "--out"),
        (["nosuch", "--out", "o"], "no preset 'nosuch'"),
    ],
)
def test_a_wrong_option_is_one_clear_line(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_submitted_job_refuses_relative_paths_and_prints_the_absolute_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.RAY_JOB_VARIABLE, "{}")
    with pytest.raises(InputError, match=r'--out "\$PWD/runs/a"'):
        parse("--out", "runs/a")
    assert parse("--out", "/runs/a", "--scores", "s3://b/c").out == "/runs/a"


SCRIPT = """
import sys
from jobs import cli
from pipelines import errors
from tests.jobs.test_cli import Example
def main(options):
    if options.mode == "slow":
        raise getattr(errors, options.init.rsplit("/", 1)[1])("what, where, what next")
    return 0
cli.run("example", Example, main)
"""


@pytest.mark.parametrize(
    ("error", "code"),
    [("InputError", 2), ("ContractError", 2), ("StageConflict", 2), ("EnvironmentFailed", 3), ("Refused", 4)],
)
def test_errors_leave_with_their_exit_code_and_one_line(error: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--out", "o", "--mode", "slow", "--init", error],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == code
    assert done.stderr == "example: what, where, what next\n"
