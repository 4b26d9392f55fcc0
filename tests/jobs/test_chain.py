"""What a launch says of its steps' seconds: true ones, or none."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import chain, cli
from jobs.chain import Step, seconds_of


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Makes `some_job` do what it is given."""
    monkeypatch.setattr(cli, "parse", lambda *_: None)

    def set_to(main: Callable[[], int]) -> None:
        monkeypatch.setitem(sys.modules, "jobs.some_job", SimpleNamespace(Options=None, main=lambda options: main()))

    return set_to


def run(out: Path) -> None:
    group: Any = None
    chain._run(Step("one", "some_job", (), f"{out}/one"), str(out), "tiny", group)


def test_a_step_that_ran_in_one_attempt_has_its_seconds(job: Callable[..., None], tmp_path: Path) -> None:
    job(lambda: 0)
    run(tmp_path)
    assert list(seconds_of(str(tmp_path))) == ["one"]


def test_a_step_that_was_cut_has_none_even_when_its_next_attempt_ends(job: Callable[..., None], tmp_path: Path) -> None:
    def killed() -> int:
        raise KeyboardInterrupt

    job(killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    job(lambda: 0)
    run(tmp_path)
    assert seconds_of(str(tmp_path)) == {}


def test_a_step_that_fails_ends_the_launch_with_its_code(job: Callable[..., None], tmp_path: Path) -> None:
    job(lambda: 3)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path)
    assert ended.value.code == 3
    assert seconds_of(str(tmp_path)) == {}
