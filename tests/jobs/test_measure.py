"""The command: options that cannot be meant, and paths that become absolute."""

import pytest

from jobs import cli
from jobs.measure import Options
from pipelines.errors import InputError


def test_paths_become_absolute_and_the_reward_may_be_left_out() -> None:
    options = cli.parse("measure", Options, ("--features", "f", "--out", "/m"))
    assert options.features.startswith("/")
    assert options.out == "/m"
    assert options.reward is None


@pytest.mark.parametrize("words", [("--num-examples", "0"), ("--num-workers", "-1"), ("--gpus-per-worker", "-1")])
def test_numbers_out_of_range_are_refused(words: tuple[str, str]) -> None:
    with pytest.raises(InputError, match=words[0]):
        cli.parse("measure", Options, ("--features", "f", "--out", "m", *words))
