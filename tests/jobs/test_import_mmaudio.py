"""The command imports, or says in one line what is wrong and leaves with 2."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs import cli
from jobs.import_mmaudio import Options, main
from models.policy import Policy
from pipelines.errors import InputError
from tests.pipelines.public_factory import use_tiny_sizes, write_published

ROOT = Path(__file__).resolve().parents[2]


def parse(*words: str) -> Options:
    return cli.parse("import_mmaudio", Options, words)


def test_a_preset_names_the_size_and_without_one_it_has_to_be_said() -> None:
    assert parse("large_44k_v2", "--network", "n", "--out", "o").size == "large_44k_v2"
    assert parse("--size", "medium_44k", "--network", "n", "--out", "o").size == "medium_44k"
    with pytest.raises(InputError, match="size"):
        parse("--network", "n", "--out", "o")
    with pytest.raises(InputError, match="size"):
        parse("--size", "tiny", "--network", "n", "--out", "o")
    with pytest.raises(InputError, match="--network"):
        parse("small_16k", "--out", "o")


def test_all_five_files_become_a_policy_and_its_options_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_tiny_sizes(monkeypatch)
    files = write_published(tmp_path)
    words = [word for role, path in files.items() for word in (f"--{role}", path)]
    options = parse("small_16k", *words, "--out", str(tmp_path / "m0"), "--trust-unknown-checksum")
    assert main(options) == 0
    assert Policy.load(tmp_path / "m0").size == "small_16k"
    said = capsys.readouterr().out
    assert said.count("CC-BY-NC 4.0") == 2
    assert parse(str(tmp_path / "m0" / "config.yaml")) == options
    assert main(options) == 0
    assert "skip" in capsys.readouterr().out


def test_the_command_ends_in_one_line_and_2_on_a_file_that_is_not_published(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "mine.pth")
    command = [sys.executable, "jobs/import_mmaudio.py", "small_16k", "--network", str(tmp_path / "mine.pth")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "m0")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "af93cde404179f58e3919ac085b8033b" in done.stderr
    assert "--trust-unknown-checksum" in done.stderr
    assert not (tmp_path / "m0").exists()
