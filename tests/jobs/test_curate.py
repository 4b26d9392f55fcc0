"""The commands: a dry run prints and writes nothing; measure, then curate, end in features that open."""

from pathlib import Path

import pytest

from jobs import cli, curate, measure
from pipelines.curation.report import PAGE
from pipelines.data.contracts import FEATURES
from pipelines.data.store import Dataset
from pipelines.errors import InputError
from tests.feature_factory import write_features


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    write_features(folder / "f", {"train": 20, "val": 4})
    words = ("tiny", "--features", str(folder / "f"), "--out", str(folder / "m"), "--num-workers", "0")
    assert measure.main(cli.parse("measure", measure.Options, words)) == 0
    return folder


def run(world: Path, *words: str) -> int:
    given = ("--features", str(world / "f"), "--measures", str(world / "m"), *words)
    return curate.main(cli.parse("curate", curate.Options, given))


def test_a_dry_run_prints_what_each_predicate_drops_and_writes_nothing(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(world.rglob("*"))
    assert run(world, "--dry-run", "--keep", "loudness_lufs >= 0", "num_cuts <= 1") == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "keep"
    assert first.startswith("loudness_lufs >= 0")
    alone, in_turn, left = map(int, second.split()[-3:])
    assert in_turn <= alone
    assert left == int(first.split()[-1]) - in_turn
    assert sorted(world.rglob("*")) == before


def test_the_line_adds_up_and_the_features_open(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, "--out", str(tmp_path / "c"), "--keep", "num_cuts <= 1", "valid_s > 2") == 0
    kept = Dataset.open(str(tmp_path / "c"), FEATURES)
    assert f"24 clips in, {kept.num_rows()} kept, {24 - kept.num_rows()} filtered" in capsys.readouterr().out
    assert {row["measures"]["num_cuts"] for row in kept.read(["measures"]).to_pylist()} == {0, 1}
    assert (world / "m" / PAGE).is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", "peak < 1"), "--out is missing"),
        (("--out", "o", "--keep", "peek < 1"), "no measure 'peek'; there are valid_s, peak"),
        (("--out", "o", "--keep", "peak < one"), "is not a predicate"),
        (("--dry-run",), "keep"),
    ],
)
def test_a_command_that_cannot_be_meant_is_told_before_any_work(
    world: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(world, *words)
