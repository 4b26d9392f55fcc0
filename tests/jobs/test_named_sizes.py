"""The whole line at the shapes of small_16k: published files -> M_0, features, pairs, a round, scores and sound.

The default test has narrow networks inside and the true widths between them; the slow one the true networks.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from jobs import (
    cli,
    evaluate,
    generate,
    generate_preferences,
    import_mmaudio,
    preprocess,
    rpo_rounds,
    train_mmdit,
    train_rpo,
    train_sf_cavp,
)
from models.spec import SPECS
from pipelines.data.contracts import FEATURES, PAIRS, SCORES
from pipelines.data.media_write import write_mp4
from pipelines.data.store import Dataset
from pipelines.data.tables import column_to_numpy
from pipelines.errors import InputError, StageConflict
from tests.demo_factory import write_untrained_reward
from tests.pipelines.public_factory import use_narrow_sizes, write_full_size, write_narrow

SPEC = SPECS["16k"]
JOBS = {
    "import_mmaudio": import_mmaudio,
    "preprocess": preprocess,
    "train_sf_cavp": train_sf_cavp,
    "train_mmdit": train_mmdit,
    "generate_preferences": generate_preferences,
    "train_rpo": train_rpo,
    "rpo_rounds": rpo_rounds,
    "evaluate": evaluate,
    "generate": generate,
}
ROOT = Path(__file__).resolve().parents[2]
RUN_AND_MEASURE = """
import importlib, sys
from pathlib import Path
from jobs import cli
name = sys.argv.pop(1)
module = importlib.import_module("jobs." + name)
module.main(cli.parse(name, module.Options, sys.argv[1:]))
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""
"""A job, and then the peak memory of its process alone (a child's resource usage counts its parent's too)."""
ONE_STEP = ("--steps", "1", "--batch-size", "1", "--num-workers", "0", "--warmup-steps", "0", "--zero-stage", "0")
SHORT = ("--num-steps", "2", "--num-candidates", "2")


def job(name: str, *words: str) -> int:
    module = JOBS[name]
    return module.main(cli.parse(name, module.Options, words))


def write_clip(path: Path) -> Path:
    """8 s of film with two pictures and a sound; few pictures, because every other one costs the encoders seconds."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 6, 8, 3)).astype(np.uint8).repeat(24, 1).repeat(24, 2)
    t = np.arange(8 * 16_000) / 16_000
    wave = (0.3 * np.sin(2 * np.pi * 440 * t) * (t % 1 < 0.4)).astype(np.float32)
    write_mp4(path, pictures, Fraction(1, 4), wave, 16_000)
    return path


def sound_of(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
        return np.concatenate(frames, axis=1)[0], container.streams.audio[0].rate


def job_apart(name: str, *words: str) -> int:
    """The job in a process of its own; prints its time and its peak memory."""
    started = time.perf_counter()
    command = [sys.executable, "-c", RUN_AND_MEASURE, name, *words]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    peak_gib = int(done.stdout.splitlines()[-1]) / 2**30
    sys.__stdout__.write(f"\n  {words[0]} {name}: {time.perf_counter() - started:.0f} s, peak {peak_gib:.1f} GiB")
    return 0


class Line:
    """Runs the jobs of one size into one folder."""

    def __init__(
        self, folder: Path, size: str, files: dict[str, str], run_job: Callable[..., int], clip: Path | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.size, self._run_job = folder, size, run_job
        self.m0 = str(folder / "m0")
        self.features, self.reward = str(folder / "features"), str(write_untrained_reward(folder / "reward"))
        self.clip = str(folder / "clip.mp4")
        write_clip(Path(self.clip)) if clip is None else shutil.copy(clip, self.clip)
        flags = [word for role, path in files.items() for word in (f"--{role}", path)]
        self.run("import_mmaudio", *flags, "--out", self.m0, "--trust-unknown-checksum")

    def run(self, name: str, *words: str) -> None:
        assert self._run_job(name, self.size, *words) == 0

    def preprocess(self) -> None:
        manifest = self.folder / "clips.csv"
        manifest.write_text(f"video,caption,split\n{Path(self.clip).name},a bell rings twice,train\n")
        words = ("--manifest", str(manifest), "--weights", self.m0, "--num-workers", "0")
        self.run("preprocess", *words, "--out", self.features)

    def models(self, policy: str) -> tuple[str, ...]:
        return ("--policy", policy, "--reward", self.reward, "--features", self.features, "--num-workers", "0")

    def round(self) -> str:
        """M_0 trained on for a step, a pair of it, and a preference step on that; returns the last policy."""
        tuned, pairs, after = (str(self.folder / name) for name in ("tuned", "pairs", "after"))
        words = ("--features", self.features, "--init", self.m0, *ONE_STEP, "--ema-width", "None", "--no-bf16")
        self.run("train_mmdit", *words, "--out", tuned)
        own = ("--weights", self.m0, "--split", "train", "--margin", "0", "--mode", "best_vs_worst", *SHORT)
        self.run("generate_preferences", *self.models(tuned), *own, "--out", pairs)
        words = ("--policy", tuned, "--pairs", pairs, *ONE_STEP, "--probe-every", "0", "--no-bf16", "--lora-rank", "2")
        self.run("train_rpo", *words, "--out", after)
        return after

    def evaluate(self, policy: str) -> None:
        words = ("--weights", self.m0, "--split", "train", "--num-steps", "2", "--out", str(self.folder / "scores"))
        self.run("evaluate", *self.models(policy), *words)

    def generate(self, policy: str, video: str, *words: str) -> Path:
        out = self.folder / "made.mp4"
        words = ("--policy", policy, "--weights", self.m0, "--video", video, "--num-steps", "2", *words)
        self.run("generate", *words, "--out", str(out))
        return out


def check_features(line: Line) -> None:
    """Every condition is as the contract says, and comes from the networks and not from a default."""
    rows = Dataset.open(line.features, FEATURES).read()
    names = ("clip_features", "sync_features", "text_features", "latent_mean", "latent_std")
    frames, sync, text, mean, std = (column_to_numpy(rows[name])[0].astype(np.float32) for name in names)
    assert [values.shape for values in (frames, sync, text)] == [(64, 1024), (192, 768), (77, 1024)]
    np.testing.assert_allclose(np.linalg.norm(frames, axis=1), 1, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=2e-3)
    # The picture changes once, at 4 s.
    assert np.array_equal(frames[0], frames[31])
    assert np.array_equal(frames[32], frames[63])
    assert not np.array_equal(frames[31], frames[32])
    segments = sync.reshape(24, 8 * 768)
    assert len({segment.tobytes() for segment in segments}) == 4
    assert np.array_equal(segments[0], segments[10])
    assert mean.shape == std.shape == (SPEC.latent_len, SPEC.latent_dim)
    assert std.min() > 0


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Line:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("narrow")
    with pytest.MonkeyPatch.context() as patch:
        use_narrow_sizes(patch)
        line = Line(folder, "small_16k", write_narrow(folder / "published"), job)
        line.preprocess()
    return line


def test_published_files_run_the_whole_line_at_true_shapes(narrow: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    use_narrow_sizes(monkeypatch)
    check_features(narrow)
    policy = narrow.round()
    pair = Dataset.open(str(narrow.folder / "pairs"), PAIRS).read().to_pylist()[0]
    assert len(pair["rewards"]) == 2
    narrow.evaluate(policy)
    scores = Dataset.open(str(narrow.folder / "scores"), SCORES).read().to_pylist()[0]
    assert np.isfinite(scores["mel_distance"])
    wave, rate_hz = sound_of(narrow.generate(policy, narrow.clip, "--prompt", "a bell", "--negative-prompt", "music"))
    assert rate_hz == SPEC.sample_rate_hz
    assert abs(len(wave) - 8 * rate_hz) <= 1024
    assert np.abs(wave).max() > 1e-4


def test_fault_31_features_of_another_vae_are_neither_mixed_nor_decoded_by_this_one(
    narrow: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_narrow_sizes(monkeypatch)
    files = write_narrow(tmp_path / "published")
    state = torch.load(files["vae"], weights_only=True)
    torch.save({name: value * 1.5 for name, value in state.items()}, files["vae"])
    flags = [word for role, path in files.items() if role != "clip" for word in (f"--{role}", path)]
    other = str(tmp_path / "other")
    job("import_mmaudio", "small_16k", *flags, "--out", other, "--trust-unknown-checksum")
    words = (*narrow.models(narrow.m0), "--split", "train", *SHORT, "--out", str(tmp_path / "pairs"))
    with pytest.raises(InputError, match=r"has latents of another VAE .* give the --weights they were made with"):
        job("generate_preferences", "small_16k", *words, "--weights", other)
    words = ("--manifest", str(narrow.folder / "clips.csv"), "--num-workers", "0", "--out", str(tmp_path / "f"))
    with pytest.raises(InputError, match=r"holds no clip: .*import_mmaudio.py made with --clip FILE"):
        job("preprocess", "small_16k", *words, "--weights", other)
    with pytest.raises(InputError, match="clip are needed: give --weights"):
        job("preprocess", "small_16k", *words)
    assert not (tmp_path / "pairs").exists()
    whole = str(tmp_path / "whole")
    flags = [word for role, path in files.items() for word in (f"--{role}", path)]
    job("import_mmaudio", "small_16k", *flags, "--out", whole, "--trust-unknown-checksum")
    words = (*words[:-1], str(narrow.folder / "features"))
    with pytest.raises(StageConflict, match=r"was made with other settings \(weights: .* there, .* asked\)"):
        job("preprocess", "small_16k", *words, "--weights", whole)


@pytest.mark.slow
def test_at_true_size_a_clip_becomes_features_pairs_a_step_scores_and_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights of the published shapes; MULTISOUNDGEN_CLIP names a video of 8 s to use instead of ours."""
    given = os.environ.get("MULTISOUNDGEN_CLIP")
    clip = None if given is None else Path(given)
    published = tmp_path / "published"
    with capsys.disabled():
        line = Line(tmp_path / "small", "small_16k", write_full_size(published, "small_16k"), job_apart, clip)
        shutil.rmtree(published)
        line.preprocess()
        policy = line.round()
        line.evaluate(policy)
        if given is None:
            check_features(line)
        shutil.rmtree(line.folder)
        line = Line(tmp_path / "wide", "small_44k", write_full_size(published, "small_44k"), job_apart, clip)
        wave, rate_hz = sound_of(line.generate(line.m0, line.clip, "--prompt", "a bell", "--offload"))
        assert rate_hz == 44_100
        assert np.isfinite(wave).all()
        assert np.abs(wave).max() > 1e-4
        assert given is not None or abs(len(wave) - 8 * rate_hz) <= 1024
