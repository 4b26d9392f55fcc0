"""The three steps from a window of a video, or from words alone, to its sound: conditions, latents, sound.

Each loads its own networks and sees one window a call, so that they can run in turn with a spool in between
(`generation_line.py`). Between the steps a window is named arrays, given with each step below.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.codec import build_codec
from models.encoders import build_encoders
from models.policy import CONFIG_FILE, KIND, POLICY_FILES, Policy
from models.pretrained import codec_roles, encoder_roles
from models.reward import Reward, read_reward_config
from models.spec import SPECS, ClipSpec
from models.weights import load_config
from pipelines.data.store import CHECKPOINT, open_local_files
from pipelines.errors import InputError, MediaError
from pipelines.file_clips import FileClips
from pipelines.frozen import open_frozen
from pipelines.generation_line import Arrays, Step
from pipelines.preferences.candidates import Sampling, candidate_seeds, seeded_noise
from pipelines.preferences.ranking import Ranker

CONDITION_NAMES = ("clip_features", "sync_features", "text_features")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How a sound is made; the same settings give the same sound."""

    prompt: str
    """Words about the sound; may be empty."""
    negative_prompt: str
    """Words about what is not wanted, in the place of the empty string; may be empty."""
    encoders: str | None
    """Frozen encoders of the conditions; None: those of the policy's spec."""
    seed: int
    sampling: Sampling
    num_candidates: int
    """More than one needs a reward, which picks the best of each window."""
    bf16: bool
    """Sample with the network in bfloat16."""

    def __post_init__(self) -> None:
        if self.num_candidates < 1 or self.sampling.num_steps < 1:
            raise InputError("--num-candidates and --num-steps must be at least 1")
        if self.negative_prompt and self.sampling.guidance <= 1:
            raise InputError("--negative-prompt acts through guidance: give a --guidance above 1, such as 4.5")


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Where the networks of a generation lie; each step loads its own."""

    policy: Path
    reward: Path | None
    weights: Path | None
    """Folder of the frozen public networks; None for a spec that has none."""
    spec: ClipSpec
    device: torch.device


def find_networks(policy: str, reward: str | None, weights: str | None, device: torch.device) -> Networks:
    """Open the artifacts; all that can be known without loading a network is checked here.

    `weights` of None stands for the policy's own folder, where the policy's spec has public networks.

    Raises:
        InputError: one is missing, of another kind or altered, or lacks a network that is needed.
    """
    own = open_local_files(policy, CHECKPOINT, only=POLICY_FILES)[0]
    judge = None if reward is None else open_local_files(reward, CHECKPOINT)[0]
    try:
        spec_name = load_config(own / CONFIG_FILE, KIND).get("spec")
        if judge is not None:
            read_reward_config(judge)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not isinstance(spec_name, str) or spec_name not in SPECS:
        raise InputError(f"{policy} is a policy of the spec {spec_name!r}; known are {', '.join(SPECS)}")
    spec = SPECS[spec_name]
    roles = (*encoder_roles(spec), *codec_roles(spec, decoding=True))
    frozen = open_frozen(weights, roles, policy=policy)
    return Networks(policy=own, reward=judge, weights=frozen.folder, spec=spec, device=device)


@dataclass(frozen=True, kw_only=True)
class WindowsOfVideo:
    """The windows of a video by the times at which they start."""

    path: Path
    """A local file."""
    name: str
    """What the user calls it."""
    starts_s: tuple[float, ...]


@contextmanager
def conditions_step(networks: Networks, settings: GenerationSettings, video: WindowsOfVideo | None) -> Iterator[Step]:
    """Nothing -> float16 `clip_features` [Lc, Dc], `sync_features` [Ls, Ds], `text_features` [Lt, Dt].

    Without a video the first two are absent. With a negative prompt there is `negative_text` [Lt, Dt], and with a
    reward `frames` uint8 [frames_len, frames_px, frames_px, 3], what it sees.

    Raises:
        InputError: the encoders do not exist or do not fit, or the picture cannot be used, with the reason.
    """
    spec, prompt = networks.spec, settings.prompt
    name = settings.encoders or spec.condition_kind
    try:
        encoders = build_encoders(name, spec, networks.device, networks.weights)
    except ValueError as error:
        raise InputError(str(error)) from error
    negative: Arrays = {}
    if settings.negative_prompt:
        negative = {"negative_text": encoders.encode_text(settings.negative_prompt)}
    if video is None:
        words = {"text_features": encoders.encode_text(prompt), **negative}
        yield lambda index, arrays: words
        return

    with FileClips(spec) as clips:

        def look(index: int, arrays: Arrays) -> Arrays:
            start_s, is_judged = video.starts_s[index], networks.reward is not None
            try:
                window = clips.picture(str(video.path), start_s, encoders, prompt, with_frames=is_judged)
            except MediaError as error:
                raise InputError(f"{video.name} cannot be used ({error.reason}): {error.detail}") from error
            seen = {} if window.frames is None else {"frames": window.frames}
            return {**vars(window.conditions), **negative, **seen}

        yield look


@contextmanager
def latents_step(networks: Networks, settings: GenerationSettings) -> Iterator[Step]:
    """Conditions -> stored `latents` float32 [n, N, C] of n candidates, a function of conditions, seed and index.

    Where there is no picture, the policy's learned empty features stand for it. `frames` are handed on.

    Raises:
        InputError: the policy cannot be loaded.
    """
    try:
        policy = Policy.load(networks.policy, networks.device)
    except ValueError as error:
        raise InputError(str(error)) from error
    if settings.bf16:
        policy.to(networks.device, torch.bfloat16)
    empty = dict(zip(CONDITION_NAMES, policy.network.empty_features(1), strict=True))

    def sample(index: int, arrays: Arrays) -> Arrays:
        clip, sync, text = (_batch(arrays[n]) if n in arrays else empty[n] for n in CONDITION_NAMES)
        negative = _batch(arrays["negative_text"]) if "negative_text" in arrays else None
        seeds = candidate_seeds(settings.seed, "generate", index, settings.num_candidates)
        noise = seeded_noise(seeds, policy.noise_shape(1)[1:])
        sampling = settings.sampling
        latents = policy.generate(clip, sync, text, noise, sampling.num_steps, sampling.guidance, negative)
        return {"latents": latents.cpu().numpy(), **{n: arrays[n] for n in ("frames",) if n in arrays}}

    yield sample


@contextmanager
def sound_step(networks: Networks, settings: GenerationSettings) -> Iterator[Step]:
    """Latents of n candidates -> `wave` float32 [num_samples] of the best one.

    With a reward, `reward` float64 [] is its R, NaN where every candidate was refused; the first is taken then.

    Raises:
        InputError: codec or reward cannot be loaded, or the sound is not finite.
    """
    spec, device = networks.spec, networks.device
    try:
        codec = build_codec(spec.name, device, networks.weights)
        judge = None if networks.reward is None else Reward.load(networks.reward, device)
    except ValueError as error:
        raise InputError(str(error)) from error
    ranker = None if judge is None else Ranker(judge, codec, spec.sample_rate_hz, device)

    def decode(index: int, arrays: Arrays) -> Arrays:
        latents = torch.from_numpy(arrays["latents"])
        best, verdict = 0, {}
        if ranker is not None:
            scores = ranker.score(ranker.look(arrays["frames"]), latents)
            best = max(range(len(scores)), key=lambda i: scores[i].total if scores[i].valid else -np.inf)
            verdict = {"reward": np.array(scores[best].total if scores[best].valid else np.nan)}
        chosen = latents[best : best + 1]
        if not torch.isfinite(chosen).all():
            raise InputError("the policy gives sound that is not finite; give another checkpoint")
        return {"wave": codec.decode(chosen.to(device))[0].cpu().numpy(), **verdict}

    yield decode


def _batch(features: np.ndarray) -> Tensor:
    """float16 [L, D] -> float32 [1, L, D] on the CPU."""
    return torch.from_numpy(np.asarray(features, np.float32))[None]
