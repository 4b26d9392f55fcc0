"""A video and a sound -> the reward R, its parts, and the offset at which they fit best.

A file longer than the clips that the reward was calibrated on is scored window by window; what holds for a whole clip
of the demo world or of eight seconds holds for each window.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from models.reward import Reward, RewardScore
from models.spec import ClipSpec
from pipelines.data.sound import resample
from pipelines.data.source import SourceReader
from pipelines.data.store import CHECKPOINT, open_local_files
from pipelines.data.window import DecodedWindow
from pipelines.devices import own_device
from pipelines.errors import InputError, MediaError
from pipelines.file_clips import FileClips


@dataclass(frozen=True, kw_only=True)
class WindowScore:
    """The verdict on one window; the numbers are None where its sound is refused."""

    start_s: float
    total: float | None
    semantic: float | None
    temporal: float | None
    offset_s: float | None
    invalid_reason: str | None


@dataclass(frozen=True, kw_only=True)
class FileScore:
    """The verdict on a file: means over its windows that could be scored, and the worst of them."""

    windows: tuple[WindowScore, ...]

    def mean(self, part: str) -> float | None:
        """Mean of `total`, `semantic`, `temporal` or `offset_s` over the valid windows; None where there is none."""
        values = [asdict(w)[part] for w in self.windows if w.invalid_reason is None]
        return float(np.mean(values)) if values else None

    @property
    def worst(self) -> float | None:
        """The lowest R of a window: a missed event shows there."""
        return min((w.total for w in self.windows if w.total is not None), default=None)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        means = {name: self.mean(name) for name in ("total", "semantic", "temporal", "offset_s")}
        return {**means, "worst_window": self.worst, "windows": [asdict(w) for w in self.windows]}


def load_reward(location: str, device: str | torch.device | None = None) -> Reward:
    """Load a reward checkpoint onto a device (default: `own_device`).

    Raises:
        InputError: it is missing or another kind.
    """
    try:
        return Reward.load(open_local_files(location, CHECKPOINT)[0], own_device() if device is None else device)
    except ValueError as error:
        raise InputError(f"{location} is not a reward: {error}") from error


def score_file(reward: Reward, spec: ClipSpec, *, video: str, audio: str | None) -> FileScore:
    """Score the sound of `audio` (default: the video's own) against the picture of `video`.

    Whole windows of the spec's length follow each other; what is left at the end is covered by a last one that
    overlaps. A file shorter than a window is one window, continued by its last frame and by silence.

    Raises:
        InputError: a file cannot be used, with the reason.
    """
    sources = SourceReader()
    try:
        with (
            FileClips(spec) as clips,
            sources.open(video) as picture,
            sources.open(audio or video) as sound,
        ):
            lengths = [clips.probe(str(place.path)).duration_s for place in (picture, sound)]
            known = [length for length in lengths if length is not None]
            starts = window_times(min(known) if known else spec.duration_s, spec.duration_s)
            scores = []
            for start_s in starts:
                frames = clips.frames(str(picture.path), start_s)
                wave = _wave(clips.sound(str(sound.path), start_s), spec)
                scores.append((start_s, score_clip(reward, frames, wave, spec.sample_rate_hz)))
    except MediaError as error:
        where = video if audio is None else f"{video} with {audio}"
        raise InputError(f"{where} cannot be scored ({error.reason}): {error.detail}") from error
    return FileScore(windows=tuple(_window_score(start_s, score) for start_s, score in scores))


def window_times(duration_s: float, window_s: float) -> list[float]:
    """Starts in seconds of windows that cover a duration: end to end, the last one moved back to end with it."""
    whole = max(int((duration_s + 1e-6) // window_s), 1)
    starts = [i * window_s for i in range(whole)]
    rest = duration_s - whole * window_s
    # A rest of a frame or two is not worth a window of its own.
    return [*starts, duration_s - window_s] if rest > 0.1 * window_s else starts


def _wave(window: DecodedWindow, spec: ClipSpec) -> np.ndarray:
    """float32 [num_samples] at the spec's rate; unlike preprocess it keeps silence and clipping, which R judges."""
    if window.audio is None:
        raise MediaError("no_audio", "the file has no sound")
    wave = resample(np.array(window.audio), window.audio_rate_hz, spec.sample_rate_hz)
    margin = window.audio_margin * spec.sample_rate_hz // window.audio_rate_hz
    return wave[margin : margin + spec.num_samples]


def score_clip(reward: Reward, frames: np.ndarray, wave: np.ndarray, rate_hz: int) -> RewardScore:
    """Score a clip's wave float32 [S] against its frames uint8 [T, H, W, 3] at 16 fps, on the reward's device."""
    device = next(reward.model.parameters()).device
    pixels = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 255
    features = reward.video_features(pixels[None])
    return reward.score(features, torch.from_numpy(wave)[None].to(device), rate_hz)[0]


def _window_score(start_s: float, score: RewardScore) -> WindowScore:
    return WindowScore(
        start_s=start_s,
        total=score.total if score.valid else None,
        semantic=score.semantic if score.valid else None,
        temporal=score.temporal if score.valid else None,
        offset_s=score.offset_s if score.valid else None,
        invalid_reason=score.invalid_reason,
    )
