import pytest

from pipelines.data import attempts
from pipelines.data.storage import open_folder
from pipelines.errors import EnvironmentFailed


def test_a_unit_that_is_begun_too_often_in_one_run_ends_it_and_another_run_may_try_again(tmp_path) -> None:
    folder = open_folder(tmp_path)
    for _ in range(attempts.MAX_ATTEMPTS):
        attempts.begin(folder, "train-000000-aa", "first")
    with pytest.raises(EnvironmentFailed, match=r"train-000000-aa was begun 6 times .* same command again"):
        attempts.begin(folder, "train-000000-aa", "first")
    attempts.begin(folder, "train-000001-bb", "first")
    attempts.begin(folder, "train-000000-aa", "second")
