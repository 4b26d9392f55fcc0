"""The job's door: options, exit codes, one line for what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from jobs.preprocess import Options, main
from pipelines.errors import InputError
from tests.pipelines.clip_factory import simple_clip

ROOT = Path(__file__).resolve().parents[2]


def job(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "preprocess.py"), *flags], capture_output=True, text=True, timeout=120
    )


def test_the_preset_and_the_flags_give_the_options(tmp_path: Path) -> None:
    options = cli.parse("preprocess", Options, ["tiny", "--manifest", "m.csv", "--out", str(tmp_path)])
    assert (options.spec, options.encoders, options.windows) == ("tiny", "grids", "first")
    assert Path(str(options.manifest)).is_absolute()
    again = tmp_path / "config.yaml"
    again.write_text(cli.to_yaml("preprocess", options))
    assert cli.parse("preprocess", Options, [str(again)]) == options


@pytest.mark.parametrize(
    "flags",
    [
        ["--out", "x"],
        ["--out", "x", "--videos", "b", "--stall-timeout-s", "1"],
        ["--manifest", "a.csv"],
        ["--out", "x", "--videos", "b", "--hop-s", "1"],
        ["--out", "x", "--videos", "b", "--windows", "all", "--hop-s", "0"],
        ["--out", "x", "--videos", "b", "--windows", "some"],
        ["--out", "x", "--videos", "b", "--max-reject-rate", "2"],
        ["--out", "x", "--videos", "b", "--num-workers", "-1"],
        ["--out", "x", "--videos", "b", "--no-such-option", "1"],
    ],
)
def test_wrong_options_are_wrong_input(flags: list[str]) -> None:
    with pytest.raises(InputError):
        cli.parse("preprocess", Options, flags)


def test_a_folder_of_videos_becomes_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        simple_clip(tmp_path / "videos" / name)
    options = Options(videos=str(tmp_path / "videos"), out=str(tmp_path / "out"), num_workers=0)
    assert main(options) == 0
    assert "2 clips in, 2 rows, 0 rejected" in capsys.readouterr().out
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert cli.parse("preprocess", Options, [str(tmp_path / "out" / "config.yaml")]) == options


def test_exit_codes_and_lines_of_the_command(tmp_path: Path) -> None:
    manifest = tmp_path / "clips.csv"
    manifest.write_text("video,split\na.mp4,dev\n")
    wrong = job("tiny", "--manifest", str(manifest), "--out", str(tmp_path / "out"), "--num-workers", "0")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "line 2: split 'dev'" in wrong.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "a.mp4").write_bytes(b"")
    manifest.write_text("video\na.mp4\n")
    refused = job("tiny", "--manifest", str(manifest), "--out", str(tmp_path / "out"), "--num-workers", "0")
    assert refused.returncode == 4
    assert "none of 1 clips could be used (1 empty)" in refused.stderr


def test_help_answers_without_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom jobs import cli\nfrom jobs.preprocess import Options, main\n"
        "try:\n    cli.parse('preprocess', Options, ['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'deepspeed', 'pyarrow', 'av'} & set(sys.modules)), file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stderr.strip() == "[]"
    assert "--max-reject-rate" in answer.stdout
