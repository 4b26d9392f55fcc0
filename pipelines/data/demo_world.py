"""The demo world: synthetic clips with several sounding events whose kind and time are known.

Two or three of three kinds of objects share a clip, each with one to three events; sounds of different kinds live in
separate bands, so that a detector which knows nothing of any network can score a generated sound.
Frame i shows the instant i / 16 s; nothing is drawn that depends on the encoder of the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

DURATION_S = 2.5
SAMPLE_RATE_HZ = 16_000
FRAME_RATE_HZ = 16
FRAME_PX = 64
NUM_SAMPLES = round(DURATION_S * SAMPLE_RATE_HZ)
NUM_FRAMES = round(DURATION_S * FRAME_RATE_HZ)

CAPTION = "objects that bounce, light up and sweep"
"""One caption for all clips: it tells nothing about which objects sound, or when."""

BALL_PITCH_HZ: Mapping[str, float] = {"red": 350.0, "green": 560.0, "blue": 880.0, "yellow": 1350.0}
LAMP_PITCH_HZ: Mapping[str, float] = {"orange": 1900.0, "cyan": 2400.0, "magenta": 3050.0, "white": 3850.0}
BAR_DIRECTIONS = ("left", "right")
"""A bar that moves to the right sweeps up, one that moves to the left sweeps down."""
BAR_BAND_HZ = (4900.0, 7500.0)
BAR_DURATION_S = 0.4
PING_DURATION_S = 0.15

_RGB: Mapping[str, tuple[int, int, int]] = {
    "red": (215, 45, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (225, 205, 45),
    "orange": (255, 140, 30),
    "cyan": (40, 235, 235),
    "magenta": (240, 60, 220),
    "white": (255, 255, 245),
}
_KINDS = ("ball", "lamp", "bar")
_COUNT_ODDS = (0.36, 0.40, 0.24)
"""Odds of one, two and three events of an object: 1.88 on average, so about 4.7 a clip."""
_FALL_PX_S2 = 900.0
_NOISE_AMPLITUDE = 0.002

_Y, _X = np.mgrid[0:FRAME_PX, 0:FRAME_PX].astype(np.float32)
_frame_times_s = np.arange(NUM_FRAMES) / FRAME_RATE_HZ


@dataclass(frozen=True, kw_only=True)
class Event:
    """One sounding event; `variant` is the colour of a ball or lamp, the direction of a bar."""

    time_s: float
    duration_s: float
    kind: str
    variant: str


@dataclass(frozen=True, kw_only=True)
class DemoClip:
    """A rendered clip: frames uint8 [40, 64, 64, 3], wave float32 [40000] in (-1, 1), events in order of time."""

    frames: np.ndarray
    wave: np.ndarray
    events: tuple[Event, ...]


def render_clip(seed: int, index: int) -> DemoClip:
    """Clip `index` (>= 0) of the world `seed` (>= 0); the same pair always gives the same clip."""
    rng = np.random.default_rng([seed, index])
    frames = _background(rng)
    wave = rng.standard_normal(NUM_SAMPLES, dtype=np.float32) * np.float32(_NOISE_AMPLITUDE)
    _draw_distractor(frames, rng)
    kinds = rng.permutation(_KINDS)[: rng.integers(2, 4)]
    events: list[Event] = []
    for kind in kinds:
        count = int(rng.choice(3, p=_COUNT_ODDS)) + 1
        events += _OBJECTS[str(kind)](frames, wave, count, rng)
    noise = np.frombuffer(rng.bytes(frames.size), np.uint8).reshape(frames.shape) & 7
    frames += noise - np.float32(3.5)
    return DemoClip(
        frames=np.clip(frames, 0, 255).astype(np.uint8),
        wave=np.clip(wave, -0.99, 0.99),
        events=tuple(sorted(events, key=lambda e: (e.time_s, e.kind))),
    )


def _background(rng: np.random.Generator) -> np.ndarray:
    """A dark, nearly grey gradient in a random direction, float32 [T, H, W, 3], a copy for every frame."""
    low = rng.uniform(25, 35) + rng.uniform(-6, 6, 3)
    high = rng.uniform(45, 60) + rng.uniform(-6, 6, 3)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(angle) * (_X / FRAME_PX - 0.5) + np.sin(angle) * (_Y / FRAME_PX - 0.5)) / np.sqrt(2) + 0.5
    picture = (low + ramp[..., None] * (high - low)).astype(np.float32)
    return np.repeat(picture[None], NUM_FRAMES, axis=0)


def _draw_distractor(frames: np.ndarray, rng: np.random.Generator) -> None:
    """A grey disc that wanders and makes no sound."""
    phase, turns = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.3, 0.9, 2)
    x = 32 + 24 * np.sin(phase[0] + 2 * np.pi * turns[0] * _frame_times_s)
    y = 30 + 20 * np.sin(phase[1] + 2 * np.pi * turns[1] * _frame_times_s)
    grey = np.full(3, rng.uniform(110, 150), np.float32)
    _draw_discs(frames, x, y, rng.uniform(3.0, 4.5), grey, np.ones(NUM_FRAMES))


def _add_ball(frames: np.ndarray, wave: np.ndarray, count: int, rng: np.random.Generator) -> list[Event]:
    """Falls into the picture, touches the floor `count` times on parabolas of one gravity, then rolls away."""
    variant = str(rng.choice(list(BALL_PITCH_HZ)))
    first_gap = rng.uniform(0.34, 0.55)
    gaps = np.maximum(first_gap * rng.uniform(0.78, 0.95) ** np.arange(count - 1), 0.3)
    first = rng.uniform(0.2, DURATION_S - 0.2 - gaps.sum())
    touches = first + np.concatenate([[0.0], np.cumsum(gaps)])
    floor, x0, roll = rng.uniform(50, 58), rng.uniform(14, 50), rng.uniform(-14, 14)
    height = np.zeros(NUM_FRAMES)
    before = _frame_times_s < touches[0]
    height[before] = 0.5 * _FALL_PX_S2 * (touches[0] - _frame_times_s[before]) ** 2
    for start, end in pairwise(touches):
        inside = (_frame_times_s >= start) & (_frame_times_s < end)
        height[inside] = 0.5 * _FALL_PX_S2 * (_frame_times_s[inside] - start) * (end - _frame_times_s[inside])
    x = x0 + roll * (_frame_times_s - touches[0])
    radius = rng.uniform(6.0, 7.0)
    _draw_discs(frames, x, floor - radius - height, radius, np.array(_RGB[variant], np.float32), np.ones(NUM_FRAMES))
    for touch in touches:
        _add_sound(wave, touch, _ping(BALL_PITCH_HZ[variant], rng))
    return [Event(time_s=float(t), duration_s=PING_DURATION_S, kind="ball", variant=variant) for t in touches]


def _add_lamp(frames: np.ndarray, wave: np.ndarray, count: int, rng: np.random.Generator) -> list[Event]:
    """A dim lamp that lights up `count` times for 0.12-0.3 s, with a beep as long as the light."""
    variant = str(rng.choice(list(LAMP_PITCH_HZ)))
    durations = rng.uniform(0.12, 0.3, count)
    starts = _place(durations, min_gap_s=0.14, rng=rng)
    x, y, radius = rng.uniform(10, 54), rng.uniform(9, 16), rng.uniform(7.0, 8.5)
    light = np.full(NUM_FRAMES, 0.18)
    for start, duration in zip(starts, durations, strict=True):
        # The share of a frame's own sixteenth of a second, centred on it, in which the lamp is lit.
        overlap = np.minimum(_frame_times_s * 16 + 0.5, (start + duration) * 16) - np.maximum(
            _frame_times_s * 16 - 0.5, start * 16
        )
        light += 0.82 * np.clip(overlap, 0, 1)
        _add_sound(wave, start, _beep(LAMP_PITCH_HZ[variant], duration, rng))
    still = np.ones(NUM_FRAMES)
    _draw_discs(frames, x * still, y * still, radius, np.array(_RGB[variant], np.float32), light)
    return [
        Event(time_s=float(t), duration_s=float(d), kind="lamp", variant=variant)
        for t, d in zip(starts, durations, strict=True)
    ]


def _add_bar(frames: np.ndarray, wave: np.ndarray, count: int, rng: np.random.Generator) -> list[Event]:
    """A bar that sweeps across the picture `count` times, each time to the left or to the right."""
    starts = _place(np.full(count, BAR_DURATION_S), min_gap_s=0.12, rng=rng)
    directions = [str(d) for d in rng.choice(BAR_DIRECTIONS, count)]
    top, height = rng.integers(20, 30), rng.integers(12, 18)
    colour = rng.uniform(150, 210, 3).astype(np.float32)
    for start, direction in zip(starts, directions, strict=True):
        for i in np.flatnonzero((_frame_times_s >= start) & (_frame_times_s < start + BAR_DURATION_S)):
            progress = (_frame_times_s[i] - start) / BAR_DURATION_S
            x = FRAME_PX * (progress if direction == "right" else 1 - progress)
            cover = np.clip(3.5 - np.abs(_X[0] - x), 0, 1)[None, :, None]
            strip = frames[i, top : top + height]
            strip += cover * (colour - strip)
        _add_sound(wave, start, _sweep(direction, rng))
    return [
        Event(time_s=float(t), duration_s=BAR_DURATION_S, kind="bar", variant=d)
        for t, d in zip(starts, directions, strict=True)
    ]


_OBJECTS: Mapping[str, Callable[[np.ndarray, np.ndarray, int, np.random.Generator], list[Event]]] = {
    "ball": _add_ball,
    "lamp": _add_lamp,
    "bar": _add_bar,
}


def _place(durations: np.ndarray, *, min_gap_s: float, rng: np.random.Generator) -> np.ndarray:
    """Start times of intervals that do not touch: the free time is cut at random places."""
    first, last = 0.12, DURATION_S - 0.06
    free = last - first - durations.sum() - min_gap_s * (len(durations) - 1)
    cuts = np.sort(rng.uniform(0, free, len(durations)))
    return first + cuts + np.concatenate([[0.0], np.cumsum(durations[:-1] + min_gap_s)])


def _draw_discs(
    frames: np.ndarray, x: np.ndarray, y: np.ndarray, radius: float, colour: np.ndarray, alpha: np.ndarray
) -> None:
    """Blend one soft-edged disc into each frame: centres x, y [T] in pixels, opacity alpha [T]."""
    reach = int(radius) + 2
    for i, frame in enumerate(frames):
        left, top = int(x[i]) - reach, int(y[i]) - reach
        rows, columns = slice(max(top, 0), top + 2 * reach + 1), slice(max(left, 0), left + 2 * reach + 1)
        if rows.stop <= 0 or columns.stop <= 0:
            continue
        patch = frame[rows, columns]
        distance = np.hypot(_X[rows, columns] - x[i], _Y[rows, columns] - y[i])
        cover = np.clip(radius + 0.5 - distance, 0, 1) * alpha[i]
        patch += cover[..., None].astype(np.float32) * (colour - patch)


def _add_sound(wave: np.ndarray, start_s: float, sound: np.ndarray) -> None:
    first = round(start_s * SAMPLE_RATE_HZ)
    length = min(len(sound), len(wave) - first)
    wave[first : first + length] += sound[:length].astype(np.float32)


def _ping(pitch_hz: float, rng: np.random.Generator) -> np.ndarray:
    """A tone that decays by 1/e every 55 ms."""
    t = np.arange(round(0.35 * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    tone = np.sin(2 * np.pi * pitch_hz * t) * np.exp(-t / 0.055)
    return rng.uniform(0.22, 0.32) * tone * _fade(t, 0.005, 0.02)


def _beep(pitch_hz: float, duration_s: float, rng: np.random.Generator) -> np.ndarray:
    t = np.arange(round(duration_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    return rng.uniform(0.11, 0.16) * np.sin(2 * np.pi * pitch_hz * t) * _fade(t, 0.005, 0.008)


def _sweep(direction: str, rng: np.random.Generator) -> np.ndarray:
    """Noise about 600 Hz wide whose centre moves through the bar's band in 0.4 s."""
    t = np.arange(round(BAR_DURATION_S * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    low, high = BAR_BAND_HZ[0] + 300, BAR_BAND_HZ[1] - 300
    centre_hz = low + (high - low) * t / BAR_DURATION_S
    if direction == "left":
        centre_hz = centre_hz[::-1]
    kernel = np.hanning(42)[1:-1]
    white = rng.standard_normal((2, len(t) + 39))
    narrow = np.array([np.convolve(w, kernel, mode="valid") for w in white]) / np.linalg.norm(kernel)
    phase = 2 * np.pi * np.cumsum(centre_hz) / SAMPLE_RATE_HZ
    noise = narrow[0] * np.cos(phase) - narrow[1] * np.sin(phase)
    return rng.uniform(0.065, 0.09) * noise * _fade(t, 0.01, 0.015)


def _fade(t: np.ndarray, attack_s: float, release_s: float) -> np.ndarray:
    """Envelope 0 -> 1 in `attack_s`, 1 -> 0 in the last `release_s`, as squared sines."""
    rise = np.minimum(t / attack_s, (t[-1] - t) / release_s)
    return np.sin(0.5 * np.pi * np.clip(rise, 0, 1)) ** 2


@dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """Which clip is called what and belongs where."""

    clip_id: str
    split: str
    index: int


_SPLIT_OFFSETS: Mapping[str, int] = {"train": 0, "rpo": 500_000, "val": 700_000, "test": 800_000}
DEFAULT_COUNTS: Mapping[str, int] = {"train": 2048, "rpo": 512, "val": 256, "test": 256}


def plan_clips(counts: Mapping[str, int]) -> list[ClipPlan]:
    """The clips of a world with `counts` clips a split, in order of clip id.

    Every split has its own range of indices, so a clip keeps its id and its split when another split grows.

    Raises:
        ValueError: an unknown split, or a count that does not fit its range.
    """
    plans = []
    ends = [*list(_SPLIT_OFFSETS.values())[1:], 1_000_000]
    unknown = set(counts) - set(_SPLIT_OFFSETS)
    if unknown:
        raise ValueError(f"unknown splits {sorted(unknown)}; the demo world has {list(_SPLIT_OFFSETS)}")
    for (split, offset), end in zip(_SPLIT_OFFSETS.items(), ends, strict=True):
        count = counts.get(split, 0)
        if not 0 <= count <= end - offset:
            raise ValueError(f"{count} clips do not fit split '{split}', which holds 0 to {end - offset}")
        plans += [ClipPlan(clip_id=f"demo_{i:06d}", split=split, index=i) for i in range(offset, offset + count)]
    return plans
