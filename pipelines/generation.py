"""A video -> the same video with generated sound; or a video, or words alone, -> a sound.

A generator makes windows of one length; a longer sound is made of overlapping windows whose ends are blended. Windows
are made as the writer asks for them, so memory does not grow with the length; with `offload` only one step's networks
are loaded at a time, and what is between the steps waits on disk. With a reward, each window is the best of several
candidates.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.spec import ClipSpec
from pipelines.crossfade import cross_faded, window_starts
from pipelines.data.media_stream import SOUND_SUFFIXES, mux_with_copied_video, picture_duration_s, write_sound
from pipelines.data.source import SourceReader
from pipelines.devices import own_device
from pipelines.errors import EnvironmentFailed, InputError, MediaError
from pipelines.generation_line import Arrays, LineStep, Watch, run_line, run_line_offloaded
from pipelines.generation_steps import (
    GenerationSettings,
    Networks,
    WindowsOfVideo,
    conditions_step,
    find_networks,
    latents_step,
    sound_step,
)
from pipelines.peak_memory import PeakMemory, peak_memory, restart_peak

FADE_S = 0.25
"""Length of a joint between two windows."""
VIDEO_SUFFIX = ".mp4"
MAX_WAV_BYTES = (1 << 32) - 1024
"""A wav file counts its bytes in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class GenerationInputs:
    """What a sound is made of and for: artifacts, and either a video or a duration."""

    policy: str
    reward: str | None = None
    weights: str | None = None
    """Folder of the frozen public networks; None: the policy's own, where its spec has some."""
    video: str | None = None
    duration_s: float | None = None
    """Seconds of sound from words alone."""

    def __post_init__(self) -> None:
        if (self.video is None) == (self.duration_s is None):
            raise InputError("give either --video, whose length the sound takes, or --duration-s for sound without one")
        if self.duration_s is not None and not (math.isfinite(self.duration_s) and self.duration_s > 0):
            raise InputError(f"--duration-s {self.duration_s:g} must be a positive number of seconds")
        if self.video is None and self.reward is not None:
            raise InputError("--reward judges sound against a picture: leave it out, or give --video")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What was made."""

    duration_s: float
    num_windows: int
    rewards: tuple[float | None, ...]
    """R of each window's sound, None where it was not scored or refused; empty without a reward."""
    peaks: tuple[tuple[str, PeakMemory], ...]
    """The most memory that each step took, or all of them together."""


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """Windows that cover a sound, in samples."""

    total: int
    fade: int
    starts: tuple[int, ...]


def plan_windows(duration_s: float, spec: ClipSpec) -> WindowPlan:
    """The windows of a spec over so many seconds; at least one sample."""
    total = max(round(duration_s * spec.sample_rate_hz), 1)
    fade = round(FADE_S * spec.sample_rate_hz)
    return WindowPlan(total=total, fade=fade, starts=tuple(window_starts(total, spec.num_samples, fade + 1)))


def generate(
    inputs: GenerationInputs,
    settings: GenerationSettings,
    *,
    out: str,
    offload: bool = False,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Generated:
    """Write `out`: an mp4 with the video's picture, its packets copied, and the sound; or a wav or FLAC of the sound.

    The file appears under its name only when complete.

    Args:
        inputs: artifacts and source.
        settings: how the sound is made.
        out: a file of an existing local folder, ending in .mp4, .wav or .flac.
        offload: load one step's networks at a time; the result is the same.
        progress: is told step, windows done, windows in all.

    Raises:
        InputError: something that is given cannot be used, with the reason.
        EnvironmentFailed: `out` or the space beside it cannot be written.
    """
    if settings.num_candidates > 1 and inputs.reward is None:
        raise InputError("--num-candidates needs --reward: nothing else says which candidate is best")
    target = _checked_target(out, inputs)
    networks = find_networks(inputs.policy, inputs.reward, inputs.weights, own_device())
    rate_hz = networks.spec.sample_rate_hz
    with ExitStack() as stack:
        picture, duration_s = _source(inputs, stack)
        plan = plan_windows(duration_s, networks.spec)
        if target.suffix.lower() == ".wav" and 2 * plan.total > MAX_WAV_BYTES:
            raise InputError(f"--out {out}: {duration_s:.0f} s are too long for a wav; end it in .flac")
        video = None
        if picture is not None:
            starts_s = tuple(start / rate_hz for start in plan.starts)
            video = WindowsOfVideo(path=picture, name=inputs.video or "", starts_s=starts_s)
        run = _Run(networks=networks, settings=settings, video=video, num_windows=len(plan.starts), progress=progress)
        spool = stack.enter_context(_spool(target)) if offload else None
        blocks = cross_faded(run.waves(spool), plan.starts, plan.total, plan.fade)
        if picture is not None and target.suffix.lower() == VIDEO_SUFFIX:
            mux_with_copied_video(picture, blocks, rate_hz, target)
        else:
            write_sound(blocks, rate_hz, target)
    return Generated(
        duration_s=duration_s, num_windows=len(plan.starts), rewards=tuple(run.rewards), peaks=tuple(run.peaks)
    )


class _Run:
    """One generation: its line of steps, and what is learnt while it runs."""

    def __init__(
        self,
        *,
        networks: Networks,
        settings: GenerationSettings,
        video: WindowsOfVideo | None,
        num_windows: int,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.rewards: list[float | None] = []
        self.peaks: list[tuple[str, PeakMemory]] = []
        self._num_windows = num_windows
        self._steps = (
            LineStep(name="conditions", load=lambda: conditions_step(networks, settings, video)),
            LineStep(name="latents", load=lambda: latents_step(networks, settings)),
            LineStep(name="sound", load=lambda: sound_step(networks, settings)),
        )
        self._watch = Watch(
            progress=progress,
            begins=lambda name: restart_peak(networks.device),
            ended=lambda name: self.peaks.append((name, peak_memory(networks.device))),
        )

    def waves(self, spool: Path | None) -> Iterator[np.ndarray]:
        """float32 [num_samples] of each window, made when it is asked for; nothing is loaded before."""
        for arrays in self._line(spool):
            if "reward" in arrays:
                total = float(arrays["reward"])
                self.rewards.append(None if math.isnan(total) else total)
            yield arrays["wave"]

    def _line(self, spool: Path | None) -> Iterator[Arrays]:
        if spool is None:
            return run_line(self._steps, self._num_windows, self._watch)
        return run_line_offloaded(self._steps, self._num_windows, spool, self._watch)


def _checked_target(out: str, inputs: GenerationInputs) -> Path:
    target = Path(out)
    if "://" in out or not target.parent.is_dir():
        raise InputError(f"--out {out}: give a file in a local folder that exists")
    if target.is_dir():
        raise InputError(f"--out {out} is a folder; give the name of a file")
    suffix = target.suffix.lower()
    if suffix not in (VIDEO_SUFFIX, *SOUND_SUFFIXES):
        raise InputError(
            f"--out {out} must end in .mp4 for the video with the sound, .wav or .flac for the sound alone"
        )
    if suffix == VIDEO_SUFFIX and inputs.video is None:
        raise InputError(f"--out {out}: without --video there is no picture; end it in .wav or .flac")
    if inputs.video is not None and target.exists() and Path(inputs.video).exists() and target.samefile(inputs.video):
        raise InputError(f"--out {out} is the video itself; give another name")
    return target


def _source(inputs: GenerationInputs, stack: ExitStack) -> tuple[Path | None, float]:
    """A local file with the picture, if there is one, and the seconds of sound that are wanted."""
    if inputs.video is None:
        return None, inputs.duration_s or 0.0
    try:
        media = stack.enter_context(SourceReader().open(inputs.video))
    except MediaError as error:
        raise InputError(f"{inputs.video} cannot be used ({error.reason}): {error.detail}") from error
    return media.path, picture_duration_s(media.path)


@contextmanager
def _spool(target: Path) -> Iterator[Path]:
    """An empty folder beside the result (/tmp may be memory); one that a killed run has left is emptied."""
    folder = target.with_name(f"{target.name}.spool")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
    except OSError as error:
        raise EnvironmentFailed(f"cannot make {folder}: {error}; free the disk and run the command again") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
