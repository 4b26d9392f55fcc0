"""Jobs of seconds, killed at several moments: what they make is absent or whole, and the same command makes it."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.data.units import HERE
from pipelines.evaluation.evaluate import EvaluationInputs, evaluate
from pipelines.evaluation.subjects import EvaluationSettings
from pipelines.preferences.candidates import Sampling
from tests.demo_factory import write_demo_features, write_demo_video, write_untrained_policy, write_untrained_reward

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0
SHARES = (0.5, 0.8, 0.95)
"""Moments of the kill, as shares of what a whole run takes."""


def start(job: str, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "tiny", *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """SIGKILL once `reached`, or let it end if it was faster."""
    while process.poll() is None and not reached():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_generate_leaves_no_video_or_a_whole_one(tmp_path: Path) -> None:
    policy, video = write_untrained_policy(tmp_path / "policy"), write_demo_video(tmp_path / "in.mp4", 6.0)
    flags = ["--policy", str(policy), "--video", str(video), "--num-steps", "2"]
    whole, out = tmp_path / "whole.mp4", tmp_path / "out.mp4"
    started = time.monotonic()
    assert start("generate", *flags, "--out", str(whole)).wait(LIMIT_S) == 0
    took_s = time.monotonic() - started
    begun = time.monotonic()
    moments: list[Callable[[], bool]] = [
        lambda share=share: time.monotonic() - begun > share * took_s for share in SHARES
    ]
    # And while the file is being written.
    moments.append(lambda: Path(f"{out}.part").exists())
    for reached in moments:
        begun = time.monotonic()
        kill_when(start("generate", *flags, "--out", str(out)), reached)
        assert not out.exists() or out.read_bytes() == whole.read_bytes()
        out.unlink(missing_ok=True)
    assert start("generate", *flags, "--out", str(out)).wait(LIMIT_S) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not Path(f"{out}.part").exists()


@pytest.mark.slow
def test_a_report_is_finished_or_not_there(tmp_path: Path) -> None:
    features = str(write_demo_features(tmp_path / "features", {"test": 4}))
    scores = str(tmp_path / "scores")
    evaluate(
        EvaluationInputs(features=features, reward=str(write_untrained_reward(tmp_path / "reward")), policy=None),
        EvaluationSettings(
            subject="ground_truth",
            split="test",
            seed=0,
            num_candidates=1,
            sampling=Sampling(num_steps=1, guidance=1.0),
            max_clips=None,
        ),
        out=scores,
        pool=HERE,
    )
    flags = ["--features", features, "--scores", scores, "--labels", "real", "--num-resamples", "20"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start("report", *flags, "--out", str(whole)).wait(LIMIT_S) == 0
    moments: list[Callable[[], bool]] = [(out / "stage.json").exists, (out / "index.html").exists]
    for reached in moments:
        kill_when(start("report", *flags, "--out", str(out)), reached)
        for name in ("manifest.json", "index.html", "table.txt"):
            path = out / name
            assert not path.exists() or path.read_bytes() == (whole / name).read_bytes()
    assert start("report", *flags, "--out", str(out)).wait(LIMIT_S) == 0
    for name in ("manifest.json", "index.html", "table.txt", "summary.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
