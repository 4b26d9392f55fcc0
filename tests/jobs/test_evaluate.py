"""The command: wrong options are one line and exit 2 before anything is loaded."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jobs import cli
from jobs.evaluate import Options, main
from pipelines.data.contracts import SCORES
from pipelines.data.store import Dataset
from pipelines.errors import InputError
from tests.demo_factory import write_demo_features, write_untrained_policy, write_untrained_reward
from tests.pipelines.external_factory import clip_names, write_external

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


def test_columns_of_outside_networks_are_printed_with_and_without_vgg_ss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, reward = write_demo_features(tmp_path / "features", {"test": 4}), write_untrained_reward(tmp_path / "r")
    rng = np.random.default_rng(0)
    names, embeddings = clip_names(12), rng.normal(size=(12, 5))
    for side in ("made", "real"):
        write_external(tmp_path / side / "imagebind_embeddings.npz", names, embeddings)
    (tmp_path / "ids.txt").write_text("\n".join(names[:3]))
    words = [
        *("--subject", "ground_truth", "--num-workers", "0", "--features", str(features), "--reward", str(reward)),
        *("--external-generated", str(tmp_path / "made"), "--external-reference", str(tmp_path / "real")),
        *("--vggss", str(tmp_path / "ids.txt")),
    ]
    assert main(parse(*words, "--out", str(tmp_path / "scores"))) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("IB-score"))
    # Value, clips, missing, extra; of all clips and of those outside VGG-SS.
    values = [float(word) for word in line.split()[2:]]
    assert values == [100.0, 12, 0, 0, 100.0, 9, 0, 0]
    (tmp_path / "made" / "imagebind_embeddings.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="it is no npz archive"):
        main(parse(*words, "--out", str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="--external-generated"):
        parse(*NEEDED, "--subject", "ground_truth", "--vggss", "ids")


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_gives_the_digest_of_an_uninterrupted_one(tmp_path: Path) -> None:
    words = [
        *(sys.executable, "jobs/evaluate.py", "tiny", "--num-workers", "0"),
        *("--features", str(write_demo_features(tmp_path / "features", {"test": 70}))),
        *("--reward", str(write_untrained_reward(tmp_path / "reward"))),
        *("--policy", str(write_untrained_policy(tmp_path / "policy"))),
    ]

    def command(name: str) -> list[str]:
        return [*words, "--out", str(tmp_path / name)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    victim = subprocess.Popen(command("broken"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "broken" / "data"
    while not (parts.is_dir() and any(parts.glob("part-*.parquet"))):
        assert victim.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "broken" / "manifest.json").exists()
    again = subprocess.run(command("broken"), check=True, capture_output=True, text=True)
    assert "evaluate: resume" in again.stdout
    digests = [Dataset.open(str(tmp_path / name), SCORES).digest for name in ("whole", "broken")]
    assert digests[0] == digests[1]
