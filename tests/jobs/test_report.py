"""The command: every scores dataset has its label."""

import pytest

from jobs import cli
from jobs.report import Options
from pipelines.errors import InputError


def parse(*words: str) -> Options:
    return cli.parse("report", Options, words)


def test_scores_and_labels_are_lists_and_paths_become_absolute() -> None:
    options = parse("--scores", "a", "/b", "--labels", "M_0", "M_1", "--features", "f", "--out", "o")
    assert options.labels == ("M_0", "M_1")
    assert options.scores[0].startswith("/")
    assert options.scores[0].endswith("/a")
    assert options.scores[1] == "/b"


@pytest.mark.parametrize(
    ("labels", "message"), [(("M_0",), "2 --scores and 1 --labels"), (("M_0", "M_0"), "name of its own")]
)
def test_labels_that_do_not_fit_are_refused(labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse("--scores", "a", "b", "--labels", *labels, "--features", "f", "--out", "o")
