"""A video -> the same video with generated sound.

A generator makes windows of one length; a longer video is covered by overlapping windows whose sounds are blended. At
most two windows of sound and one of pictures are in memory beside the finished sound. With a reward, each window is
the best of several candidates.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.codec import build_codec
from models.encoders import build_encoders
from models.policy import Policy
from models.reward import Reward
from models.spec import SPECS, ClipSpec
from pipelines.crossfade import cross_faded, window_starts
from pipelines.data.media_write import mux_with_copied_video, picture_duration_s
from pipelines.data.source import SourceReader
from pipelines.data.store import open_files
from pipelines.devices import own_device
from pipelines.errors import InputError, MediaError
from pipelines.file_clips import FileClips, FileWindow
from pipelines.preferences.candidates import Sampling, candidate_seeds, sample_candidates
from pipelines.preferences.generation import CHECKPOINT
from pipelines.preferences.ranking import Ranker

FADE_S = 0.25
"""Length of a joint between two windows."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How a sound is made for a video."""

    prompt: str
    encoders: str
    seed: int
    sampling: Sampling
    num_candidates: int
    """More than one needs a reward, which picks the best of each window."""

    def __post_init__(self) -> None:
        if self.num_candidates < 1 or self.sampling.num_steps < 1:
            raise InputError("--num-candidates and --num-steps must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What was made."""

    duration_s: float
    num_windows: int
    rewards: tuple[float | None, ...]
    """R of each window's sound, None where it was not scored or refused; empty without a reward."""


class Generator:
    """Makes the sound of windows with a policy, and a reward where there is one."""

    def __init__(self, policy: Policy, reward: Reward | None, settings: GenerationSettings) -> None:
        """Raises ValueError where the spec has no codec, or the encoders do not exist or do not fit it."""
        if settings.num_candidates > 1 and reward is None:
            raise InputError("--num-candidates needs --reward: nothing else says which candidate is best")
        device = policy.network.device
        self.spec: ClipSpec = SPECS[policy.spec_name]
        self.encoders = build_encoders(settings.encoders, self.spec, device)
        self._policy = policy
        self._settings = settings
        self._codec = build_codec(self.spec.name, device)
        self._device = device
        self._ranker = None if reward is None else Ranker(reward, self._codec, self.spec.sample_rate_hz, device)

    @property
    def is_judged(self) -> bool:
        """Whether a reward picks among candidates."""
        return self._ranker is not None

    def window(self, window: FileWindow, index: int) -> tuple[np.ndarray, float | None]:
        """The sound of one window, float32 [num_samples], and its reward; a function of picture, seed and index."""
        settings = self._settings
        seeds = candidate_seeds(settings.seed, "generate", index, settings.num_candidates)
        latents = sample_candidates(self._policy, window.conditions, seeds, settings.sampling)
        best, reward = 0, None
        if self._ranker is not None:
            scores = self._ranker.score(self._ranker.look(window.frames), latents)
            best = max(range(len(scores)), key=lambda i: scores[i].total if scores[i].valid else -np.inf)
            reward = scores[best].total if scores[best].valid else None
        chosen = latents[best : best + 1]
        if not torch.isfinite(chosen).all():
            raise InputError("the policy gives sound that is not finite; give another checkpoint")
        return self._codec.decode(chosen.to(self._device))[0].cpu().numpy(), reward


def load_generator(policy: str, reward: str | None, settings: GenerationSettings) -> Generator:
    """Load the checkpoints.

    Raises:
        InputError: one is missing or of another kind, or the spec has no codec.
    """
    device = own_device()
    try:
        loaded = Policy.load(open_files(policy, CHECKPOINT)[0].local_path(), device)
        judge = None if reward is None else Reward.load(open_files(reward, CHECKPOINT)[0].local_path(), device)
        return Generator(loaded, judge, settings)
    except ValueError as error:
        raise InputError(str(error)) from error


def generate(
    generator: Generator,
    settings: GenerationSettings,
    *,
    video: str,
    out: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Generated:
    """Write `out`, an mp4 with the picture of `video`, its packets copied, and the generated sound.

    The file appears under its name only when complete. `progress` is told how many windows of how many are done.

    Raises:
        InputError: the video cannot be used, with the reason; `out` is not in a folder that exists.
    """
    target = Path(out)
    if "://" in out or not target.parent.is_dir():
        raise InputError(f"--out {out}: give a file in a local folder that exists")
    rewards: list[float | None] = []
    try:
        with SourceReader().open(video) as media, FileClips(generator.spec) as clips:
            duration_s = picture_duration_s(media.path)
            total = max(round(duration_s * generator.spec.sample_rate_hz), 1)
            fade = round(FADE_S * generator.spec.sample_rate_hz)
            starts = window_starts(total, generator.spec.num_samples, fade + 1)

            def waves() -> Iterator[np.ndarray]:
                for index, start in enumerate(starts):
                    start_s = start / generator.spec.sample_rate_hz
                    window = clips.picture(str(media.path), start_s, generator.encoders, settings.prompt)
                    wave, reward = generator.window(window, index)
                    rewards.append(reward)
                    progress(index + 1, len(starts))
                    yield wave

            sound = np.concatenate(list(cross_faded(waves(), starts, total, fade)))
            mux_with_copied_video(media.path, sound, generator.spec.sample_rate_hz, target)
    except MediaError as error:
        raise InputError(f"{video} cannot be used ({error.reason}): {error.detail}") from error
    return Generated(
        duration_s=duration_s,
        num_windows=len(starts),
        rewards=tuple(rewards) if generator.is_judged else (),
    )
