"""The reward R: how well a sound belongs to a picture, and how well it keeps its time.

R = w_s (S_sem - m_s) / d_s + w_f (S_tmp - m_f) / d_f: the similarity of the slow streams, pooled and step by step, and
that of the fast streams at no shift against shifts of 0.25 s and more, each in units of its spread over held-out real
pairs (saved with the weights). Without the units the term of larger variance would silently decide. Every sound is
brought to one level first, so that R cannot be gained by gain; silent, clipped or non-finite sound has no R at all.

Deterministic: float32, eval mode, no crop. Clips longer than 4 s are scored as the mean over 4 s windows with a hop of
2 s, the length that the model was trained on; the worst window is reported too, since a missed event shows there.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torchaudio.functional import resample

from models.sf_cavp import (
    SAMPLE_RATE_HZ,
    SAMPLES_PER_STEP,
    SF_CAVP_SIZES,
    SFCAVP,
    VIDEO_RATE_HZ,
    Streams,
    normalise_loudness,
    offset_similarity,
    semantic_similarity,
    temporal_contrast,
)
from models.weights import load_config, load_strict, load_weights, save_config, save_weights

KIND = "sf_cavp"
PARTS_VERSION = 2
"""Of how S_sem and S_tmp are computed: a calibration is worth nothing for other parts."""
WEIGHTS_FILE = "sf_cavp.safetensors"
CONFIG_FILE = "config.json"

WINDOW_STEPS, WINDOW_HOP_STEPS = 4 * VIDEO_RATE_HZ, 2 * VIDEO_RATE_HZ
EDGE_STEPS = 2
"""Fast steps left out at both ends, whose convolutions saw repeated edges."""
MAX_SHIFT_STEPS = {"tiny": 12, "tiny_wide": 12, "base": 32}
"""Greatest shift that is looked at, either way: what each size was trained to tell apart."""
SILENT_RMS = 10 ** (-60 / 20)
CLIPPED_LEVEL, CLIPPED_SHARE = 0.999, 1e-3


class VideoFeatures(NamedTuple):
    """One clip's picture, encoded once: streams of W windows and where each starts, in steps of 1/16 s."""

    streams: Streams
    starts: tuple[int, ...]


class RawParts(NamedTuple):
    """The parts before calibration, of B sounds in W windows: semantic and temporal [B, W], shift [B] in seconds."""

    semantic: Tensor
    temporal: Tensor
    offset_s: Tensor


@dataclass(frozen=True, kw_only=True)
class RewardScore:
    """The verdict on one sound. All numbers are NaN where it is not valid."""

    total: float
    """R; 0 is an average real pair, 1 a standard deviation better."""
    semantic: float
    """Similarity of the slow streams: of the clip vectors and of the steps, half and half."""
    temporal: float
    """Fast similarity as it is minus that when shifted."""
    offset_s: float
    """The shift at which the sound fits best; positive: the sound is late."""
    valid: bool
    invalid_reason: str | None
    """`silent`, `clipped` or `nonfinite`."""
    worst_window: float = math.nan
    """The lowest R of a window."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Mean and standard deviation of the two parts over held-out real pairs, and how the parts are weighed."""

    semantic_mean: float
    semantic_std: float
    temporal_mean: float
    temporal_std: float
    num_pairs: int
    semantic_weight: float = 0.5
    temporal_weight: float = 0.5

    def total(self, semantic: Tensor, temporal: Tensor) -> Tensor:
        """R of parts of any shape."""
        return (
            self.semantic_weight * (semantic - self.semantic_mean) / self.semantic_std
            + self.temporal_weight * (temporal - self.temporal_mean) / self.temporal_std
        )


class Reward:
    """A frozen SF-CAVP with its calibration."""

    def __init__(self, model: SFCAVP, size: str, calibration: Calibration) -> None:
        """Put the parts together, see `calibrated` and `load`; the model is put into eval mode and frozen."""
        self.model = model.eval().requires_grad_(False)
        self.size = size
        self.calibration = calibration

    @classmethod
    def calibrated(cls, model: SFCAVP, size: str, pairs: Iterable[tuple[Tensor, Tensor, int]]) -> "Reward":
        """Calibrate on held-out real pairs (frames [1, T, 3, H, W], wave [1, S], rate in Hz), at least two usable.

        Pairs whose sound is invalid are left out. ValueError if too few are left or a part does not vary.
        """
        unit = Calibration(semantic_mean=0, semantic_std=1, temporal_mean=0, temporal_std=1, num_pairs=0)
        reward = cls(model, size, unit)
        found = [
            score
            for frames, wave, rate_hz in pairs
            for score in reward.score(reward.video_features(frames), wave, rate_hz)
            if score.valid
        ]
        if len(found) < 2:
            raise ValueError(f"a reward is calibrated on at least 2 real pairs, got {len(found)} with usable sound")
        parts = torch.tensor([(score.semantic, score.temporal) for score in found], dtype=torch.float64)
        mean, std = parts.mean(dim=0).tolist(), parts.std(dim=0).tolist()
        if min(std) < 1e-6:
            raise ValueError(f"the parts of the reward do not vary over {len(found)} real pairs (deviations {std})")
        reward.calibration = Calibration(
            semantic_mean=mean[0],
            semantic_std=std[0],
            temporal_mean=mean[1],
            temporal_std=std[1],
            num_pairs=len(found),
        )
        return reward

    @torch.no_grad()
    def video_features(self, frames: Tensor) -> VideoFeatures:
        """Encode one clip's frames [1, T, 3, H, W] in [0, 1] at 16 fps."""
        if frames.ndim != 5 or len(frames) != 1:
            raise ValueError(f"frames of one clip are [1, T, 3, H, W], got {list(frames.shape)}")
        starts = window_starts(frames.shape[1])
        length = min(WINDOW_STEPS, frames.shape[1])
        windows = torch.cat([frames[:, start : start + length] for start in starts])
        return VideoFeatures(self.model.encode_video(windows), starts)

    @torch.no_grad()
    def sound_features(self, waves: Tensor, sample_rate_hz: int, video: VideoFeatures) -> Streams:
        """Encode sounds [B, S] in the windows of a clip: B * W streams, the windows of a sound adjacent.

        ValueError if the sound is shorter than the picture by more than 1/16 s.
        """
        num_steps = video.starts[-1] + video.streams.fast.shape[1]
        waves = resample(waves.float(), sample_rate_hz, SAMPLE_RATE_HZ)
        missing = num_steps * SAMPLES_PER_STEP - waves.shape[1]
        if missing > SAMPLES_PER_STEP:
            raise ValueError(
                f"the sound lasts {waves.shape[1] / SAMPLE_RATE_HZ:.2f} s, the picture "
                f"{num_steps / VIDEO_RATE_HZ:.2f} s: cut or pad the sound to the picture"
            )
        waves = torch.nn.functional.pad(waves, (0, max(0, missing)))[:, : num_steps * SAMPLES_PER_STEP]
        waves = normalise_loudness(waves)
        length = video.streams.fast.shape[1] * SAMPLES_PER_STEP
        windows = [waves[:, start * SAMPLES_PER_STEP : start * SAMPLES_PER_STEP + length] for start in video.starts]
        return self.model.encode_audio(torch.stack(windows, dim=1).flatten(0, 1))

    @torch.no_grad()
    def compare(self, video: VideoFeatures, sound: Streams) -> RawParts:
        """Compare one clip's picture with the features of B sounds."""
        num_windows = len(video.starts)
        num_sounds = len(sound.fast) // num_windows
        slow, fast = (stream.repeat(num_sounds, 1, 1) for stream in video.streams)
        semantic = semantic_similarity(slow, sound.slow)
        inner = slice(EDGE_STEPS, -EDGE_STEPS)
        # A clip of two seconds or less has fewer shifts than the model knows.
        reach = min(MAX_SHIFT_STEPS[self.size], fast.shape[1] - 2 * EDGE_STEPS - 1)
        shifts = torch.arange(-reach, reach + 1, device=fast.device)
        similarity = offset_similarity(fast[:, inner], sound.fast[:, inner], shifts)
        temporal = temporal_contrast(similarity, shifts)
        best = similarity.reshape(num_sounds, num_windows, -1).mean(dim=1).argmax(dim=1).cpu()
        shape = (num_sounds, num_windows)
        return RawParts(semantic.reshape(shape), temporal.reshape(shape), shifts.cpu()[best] / VIDEO_RATE_HZ)

    def score(self, video: VideoFeatures, waves: Tensor, sample_rate_hz: int) -> list[RewardScore]:
        """Score sounds [B, S] in [-1, 1] against one clip's picture, in order."""
        reasons = [invalid_reason(wave) for wave in waves]
        usable = torch.tensor([reason is None for reason in reasons])
        scores = [refused(reason or "") for reason in reasons]
        if not usable.any():
            return scores
        parts = self.compare(video, self.sound_features(waves[usable.to(waves.device)], sample_rate_hz, video))
        windows = self.calibration.total(parts.semantic, parts.temporal)
        columns = (windows.mean(1), parts.semantic.mean(1), parts.temporal.mean(1), parts.offset_s, windows.amin(1))
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for index, (total, semantic, temporal, offset_s, worst) in zip(
            usable.nonzero().flatten().tolist(), rows, strict=True
        ):
            scores[index] = RewardScore(
                total=total,
                semantic=semantic,
                temporal=temporal,
                offset_s=offset_s,
                valid=True,
                invalid_reason=None,
                worst_window=worst,
            )
        return scores

    def save(self, folder: Path) -> list[str]:
        """Write the reward into an existing folder; returns the names of the files."""
        save_weights(folder / WEIGHTS_FILE, self.model.state_dict())
        config = {
            "kind": KIND,
            "size": self.size,
            "parts": PARTS_VERSION,
            "calibration": dataclasses.asdict(self.calibration),
        }
        save_config(folder / CONFIG_FILE, config)
        return [CONFIG_FILE, WEIGHTS_FILE]

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> "Reward":
        """Read a reward, bit for bit what was saved; ValueError says what is missing or does not fit."""
        size, calibration = read_reward_config(folder)
        model = SFCAVP(SF_CAVP_SIZES[size])
        load_strict(model, load_weights(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE))
        return cls(model.to(device), size, calibration)


def read_reward_config(folder: Path) -> tuple[str, Calibration]:
    """Size and calibration of a reward; ValueError where it is none, damaged, or calibrated for other parts."""
    path = folder / CONFIG_FILE
    config = load_config(path, KIND)
    size, values = config.get("size"), config.get("calibration")
    if not isinstance(size, str) or size not in SF_CAVP_SIZES:
        raise ValueError(f"{path} names the size {size!r}; known sizes: {', '.join(SF_CAVP_SIZES)}")
    if config.get("parts") != PARTS_VERSION:
        raise ValueError(f"{path}: its reward was calibrated for other parts than this code has; train it again")
    known = {field.name for field in dataclasses.fields(Calibration)}
    if not isinstance(values, dict) or set(values) != known:
        raise ValueError(f"{path} has no whole calibration; it needs {', '.join(sorted(known))}")
    return size, Calibration(**cast(dict[str, float], values))  # pyright: ignore[reportArgumentType]


def window_starts(num_steps: int) -> tuple[int, ...]:
    """Starts of the 4 s windows of a clip of `num_steps` sixteenths of a second: every 2 s, the last one at the end."""
    if num_steps <= WINDOW_STEPS:
        return (0,)
    last = num_steps - WINDOW_STEPS
    return (*range(0, last, WINDOW_HOP_STEPS), last)


def invalid_reason(wave: Tensor) -> str | None:
    """Why a sound [S] cannot be judged, or None: not finite, silent (RMS below -60 dBFS), clipped (over 0.1 %)."""
    if not bool(torch.isfinite(wave).all()):
        return "nonfinite"
    if wave.numel() == 0 or float(wave.double().square().mean().sqrt()) < SILENT_RMS:
        return "silent"
    if float((wave.abs() >= CLIPPED_LEVEL).double().mean()) > CLIPPED_SHARE:
        return "clipped"
    return None


def refused(reason: str) -> RewardScore:
    """The score of a sound that cannot be judged."""
    nan = math.nan
    return RewardScore(total=nan, semantic=nan, temporal=nan, offset_s=nan, valid=False, invalid_reason=reason)
