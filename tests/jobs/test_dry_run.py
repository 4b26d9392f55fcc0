"""--dry-run tells what a training needs and touches nothing."""

from pathlib import Path

import pytest

from jobs import cli, train_mmdit, train_rpo
from pipelines.errors import InputError
from tests.demo_factory import write_untrained_policy

SMALL = ("--batch-size", "8", "--num-workers", "2", "--dry-run")


def table(text: str) -> dict[str, dict[str, float]]:
    lines = [line.split("  ") for line in text.splitlines()]
    header, *rows = [[cell.strip() for cell in line if cell.strip()] for line in lines if len(line) > 3]
    return {row[0]: dict(zip(header[1:], map(float, row[1 : len(header)]), strict=False)) for row in rows}


def test_every_stage_stands_in_a_table_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("small_16k", "--features", str(tmp_path / "no"), "--out", str(tmp_path / "out"), *SMALL)
    assert train_mmdit.main(cli.parse("train_mmdit", train_mmdit.Options, words)) == 0
    said = capsys.readouterr().out
    assert "small_16k: 2 workers, 4 samples at once on each; nothing was started" in said
    found = table(said)
    assert list(found) == ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    # 157 M parameters of 4 bytes, and two moments of as much each, dealt out to two workers from stage 1 on.
    assert found["ZeRO-0"]["weights"] == pytest.approx(157.2e6 * 4 / 2**30, abs=0.01)
    assert found["ZeRO-0"]["optimizer"] == pytest.approx(157.2e6 * 8 / 2**30, abs=0.01)
    assert found["ZeRO-1"]["optimizer"] == pytest.approx(found["ZeRO-0"]["optimizer"] / 2, abs=0.01)
    assert not list(tmp_path.iterdir())


def test_a_preference_training_takes_its_size_from_the_policy_and_holds_a_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = str(write_untrained_policy(tmp_path / "policy"))
    words = ("tiny", "--policy", policy, "--pairs", str(tmp_path / "no"), "--out", str(tmp_path / "out"), *SMALL)
    assert train_rpo.main(cli.parse("train_rpo", train_rpo.Options, (*words, "--gpu-gib", "0.001"))) == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny: 2 workers, 4 samples")
    assert "no stage fits" in said
    options = cli.parse("train_rpo", train_rpo.Options, (*words, "--batch-size", "9"))
    with pytest.raises(InputError, match="--batch-size 9 does not divide by 2 workers"):
        train_rpo.main(options)
    assert train_rpo.main(cli.parse("train_rpo", train_rpo.Options, (*words, "--num-workers", "1:2"))) == 0
    said = capsys.readouterr().out
    # One worker alone takes as many at once as each of two.
    assert "tiny: 1 workers, 4 samples at once" in said
    assert "tiny: 2 workers, 4 samples at once" in said
    assert not (tmp_path / "out").exists()


def test_hours_on_a_gpu_fall_with_the_workers_and_are_called_an_estimate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hours(*words: str) -> float:
        paths = ("small_16k", "--features", str(tmp_path / "no"), "--out", str(tmp_path / "out"))
        given = (*paths, "--dry-run", "--gpu", "h100", "--batch-size", "512", *words)
        assert train_mmdit.main(cli.parse("train_mmdit", train_mmdit.Options, given)) == 0
        said = capsys.readouterr().out
        assert "GPU of 80.0 GiB" in said
        assert "An estimate: 30% of the peak" in said
        return float(said.split(" h. An estimate")[0].rsplit(" ", 1)[1])

    two = hours("--num-workers", "2", "--bf16", "--steps", "300000")
    assert hours("--num-workers", "8", "--bf16", "--steps", "300000") == pytest.approx(two / 4, abs=0.1)
    # The peaks of bfloat16 and float32 are 989 and 67.
    assert hours("--num-workers", "2", "--no-bf16", "--steps", "300000") == pytest.approx(two * 989 / 67, rel=0.01)
