"""One clip's rows -> what the listening page shows of it: small videos with sound, spectrograms, marks, numbers."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data.demo_world import Event
from pipelines.data.frames import decode_frames
from pipelines.data.media_write import decode_flac, write_mp4
from pipelines.evaluation.detector import detect
from pipelines.evaluation.listening_page import Mark, PageClip, PageSound
from pipelines.evaluation.marks import mark_events
from pipelines.evaluation.measuring import known_events
from pipelines.evaluation.spectrogram import mel_decibels, spectrogram_png

LEAST_PX = 256
"""Pictures smaller than this are enlarged, or nobody could see what happens in them."""
REAL_SOUND = "real sound"


@dataclass(frozen=True, kw_only=True)
class ClipMedia:
    """A features row (caption, events, frames, audio, duration_s) and its rates."""

    row: dict[str, Any]
    sample_rate_hz: int
    frame_rate_hz: int


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A scores row of the same clip, and the name of its subject."""

    label: str
    row: dict[str, Any]
    is_truth: bool
    """The scores are those of the real sound itself."""


def page_clip(clip: ClipMedia, sounds: Sequence[Sound]) -> PageClip:
    """The real sound first, then every subject; scores of the real sound are shown on its own card."""
    truth_scores = next((sound for sound in sounds if sound.is_truth), None)
    real = (
        REAL_SOUND if truth_scores is None else truth_scores.label,
        None if truth_scores is None else truth_scores.row,
    )
    entries = [(*real, decode_flac(clip.row["audio"]))]
    entries += [(s.label, s.row, decode_flac(s.row["audio"])) for s in sounds if not s.is_truth]
    decibels = [mel_decibels(wave, clip.sample_rate_hz) for _, _, wave in entries]
    loudest_db = max(float(d.max()) for d in decibels)
    events = known_events(clip.row["events"], clip.sample_rate_hz)
    frames = enlarge(decode_frames(clip.row["frames"]))
    return PageClip(
        clip_id=clip.row["clip_id"],
        caption=clip.row["caption"],
        duration_s=clip.row["duration_s"],
        sounds=tuple(
            _page_sound(
                label,
                row,
                is_truth=index == 0,
                video_mp4=_mp4(frames, clip, wave),
                spectrogram=spectrogram_png(decibels[index], loudest_db),
                marks=_marks(events, wave, clip.sample_rate_hz),
            )
            for index, (label, row, wave) in enumerate(entries)
        ),
    )


def enlarge(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [T, H, W, 3], enlarged by a whole factor where they are smaller than 256 pixels; even sides."""
    height, width = frames.shape[1:3]
    factor = -(-LEAST_PX // min(height, width))
    size = (width * factor // 2 * 2, height * factor // 2 * 2)
    if size == (width, height):
        return frames
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.LANCZOS)) for f in frames])


def _mp4(frames: np.ndarray, clip: ClipMedia, wave: np.ndarray) -> bytes:
    sink = io.BytesIO()
    write_mp4(sink, frames, clip.frame_rate_hz, wave, clip.sample_rate_hz)
    return sink.getvalue()


def _marks(events: list[Event] | None, wave: np.ndarray, rate_hz: int) -> tuple[tuple[Mark, ...], tuple[Mark, ...]]:
    return ((), ()) if events is None else mark_events(events, detect(wave, rate_hz))


def _page_sound(
    label: str,
    row: dict[str, Any] | None,
    *,
    is_truth: bool,
    video_mp4: bytes,
    spectrogram: bytes,
    marks: tuple[tuple[Mark, ...], tuple[Mark, ...]],
) -> PageSound:
    reward = None if row is None or row["reward"] is None else row["reward"]
    return PageSound(
        label=label,
        is_truth=is_truth,
        video_mp4=video_mp4,
        spectrogram_png=spectrogram,
        true_marks=marks[0],
        heard_marks=marks[1],
        reward=None if reward is None else (reward["total"], reward["semantic"], reward["temporal"]),
        refused=None if row is None else row["invalid_reason"],
        offset_s=None if row is None else row["offset_s"],
        notes=() if row is None else _notes(row),
    )


def _notes(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    notes = []
    if row["num_events"] is not None:
        found = f"{row['num_class_matched']} of {row['num_events']}, heard {row['num_detected']}"
        notes.append(("events right", found))
    notes.append(("mel dist.", f"{row['mel_distance']:.3f}"))
    return tuple(notes)
