"""Damage in the middle of a long file, and files that are long: what is used is what lies at that time."""

import os
import random
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.data import media
from pipelines.data.decoding import DecodeLimits, Decoder
from pipelines.data.window import FrameGrid, WindowRequest
from pipelines.errors import MediaError
from pipelines.peak_memory import process_peak_bytes, restart_peak
from tests.pipelines.clip_factory import tone, write_clip

RATE_HZ = 25
LENGTH_S = 20.0
WINDOW_S = 2.0
GRID = FrameGrid(rate_hz=RATE_HZ, size_px=64, fit="stretch", num_frames=int(WINDOW_S * RATE_HZ))


def burnt(number: int, noise: np.ndarray) -> np.ndarray:
    """A picture that shows a number of ten bits as bright fields, two rows of five."""
    picture = np.full((64, 80, 3), 40, np.uint8)
    for bit in range(10):
        if number >> bit & 1:
            row, column = divmod(bit, 5)
            picture[32 * row : 32 * row + 32, 16 * column : 16 * column + 16] = 210
    return picture + noise


def number_in(picture: np.ndarray) -> int:
    fields = picture.reshape(2, 32, 64, 3)[:, 10:22].mean(axis=(1, 3))
    centres = [round(64 * (column + 0.5) / 5) for column in range(5)]
    return sum(
        1 << (5 * row + column)
        for row in range(2)
        for column, x in enumerate(centres)
        if fields[row, x - 2 : x + 2].mean() > 130
    )


def numbered_clip(path: Path, **options: object) -> Path:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 30, (8, 64, 80, 3), np.uint8)
    frames = [burnt(i, noise[i % 8]) for i in range(int(LENGTH_S * RATE_HZ))]
    return write_clip(path, frames, tone(LENGTH_S, 48_000), frame_rate=RATE_HZ, group=50, **options)  # pyright: ignore[reportArgumentType]


def request(
    start_s: float, duration_s: float = WINDOW_S, grid: FrameGrid = GRID, *, sound: bool = False
) -> WindowRequest:
    return WindowRequest(
        start_s=start_s,
        duration_s=duration_s,
        grids=(grid,),
        audio_rate_hz=16_000,
        audio_samples=round(16_000 * duration_s) if sound else 0,
        max_pixels=1 << 22,
    )


def windows_of(path: Path) -> dict[int, list[int] | str]:
    """The numbers that each window shows, or the reason why there is none."""
    found: dict[int, list[int] | str] = {}
    for index in range(int(LENGTH_S / WINDOW_S)):
        try:
            with path.open("rb") as file:
                frames = media.read_window(file, request(index * WINDOW_S)).frames[0]
            found[index] = [number_in(frame) for frame in frames]
        except MediaError as error:
            found[index] = error.reason
    return found


def damaged(content: bytes, draw: random.Random, kind: int) -> bytes:
    changed = bytearray(content)
    at = draw.randrange(len(content) // 4, len(content) * 3 // 4)
    if kind == 0:
        changed[at : at + 3000] = bytes(3000)
    elif kind == 1:
        changed[at : at + 2000] = draw.randbytes(2000)
    else:
        for _ in range(20):
            changed[at + draw.randrange(3000)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def check_damage(path: Path, *, trials: int, undetected: int = 0) -> None:
    """`undetected`: windows that may show damaged pictures; codecs have no checksums, and random bytes may decode."""
    content, draw = path.read_bytes(), random.Random(3)
    whole = windows_of(path)
    for index, numbers in whole.items():
        expected = [index * GRID.num_frames + k for k in range(GRID.num_frames)]
        # Containers with priming sound start a little before the first picture.
        assert np.abs(np.subtract(numbers, expected)).max() <= 1  # pyright: ignore[reportArgumentType,reportCallIssue]
    rejected = used = wrong = 0
    for trial in range(trials):
        broken = path.with_name(f"broken-{path.name}")
        broken.write_bytes(damaged(content, draw, trial % 3))
        for index, found in windows_of(broken).items():
            if isinstance(found, str):
                assert found == "truncated"
                rejected += 1
            else:
                used += 1
                wrong += int(np.abs(np.subtract(found, whole[index])).max() > 1)  # pyright: ignore[reportArgumentType,reportCallIssue]
    assert wrong <= undetected
    assert rejected > 0
    assert used > rejected


def test_fault_11_windows_beside_the_damage_are_used_and_no_time_is_wrong(tmp_path: Path) -> None:
    check_damage(numbered_clip(tmp_path / "long.mp4", b_frames=2), trials=6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("front.mp4", {"b_frames": 2, "faststart": True}),
        ("hevc.mp4", {"video_codec": "libx265"}),
        ("xvid.avi", {"video_codec": "mpeg4", "audio_codec": "libmp3lame"}),
    ],
)
def test_fault_11_elsewhere_at_most_one_window_of_damage_that_no_decoder_notices_is_used(
    tmp_path: Path, name: str, options: dict
) -> None:
    check_damage(numbered_clip(tmp_path / name, **options), trials=12, undetected=1)


def long_clip(path: Path, hours: int, video_codec: str = "libx264") -> Path:
    """One picture a second, which shows the second (modulo 1024), and sound of 8 kHz."""
    seconds = hours * 3600
    noise = np.zeros((64, 80, 3), np.uint8)
    frames = [burnt(i % 1024, noise) for i in range(seconds)]
    wave = np.zeros((1, 8000 * seconds), np.float32)
    wave[:, ::400] = 0.5
    options = {"audio_codec": "pcm_u8" if path.suffix == ".mov" else "libopus", "video_codec": video_codec}
    return write_clip(path, frames, wave, frame_rate=1, rate_hz=8000, group=30, **options)  # pyright: ignore[reportArgumentType]


def peak_mib(pid: int | None) -> float:
    assert pid is not None
    return process_peak_bytes(pid) / 2**20


SLOW_GRID = FrameGrid(rate_hz=1, size_px=64, fit="stretch", num_frames=8)


@pytest.mark.parametrize(
    ("name", "codec"), [("long.mov", "libx264"), pytest.param("long.webm", "libvpx", marks=pytest.mark.slow)]
)
def test_fault_06_windows_anywhere_in_a_long_file_cost_bounded_memory(tmp_path: Path, name: str, codec: str) -> None:
    path = long_clip(tmp_path / name, 1 if codec == "libvpx" else 3, codec)
    restart_peak(torch.device("cpu"))
    before_mib = peak_mib(os.getpid())
    last_s = (3 if codec == "libx264" else 1) * 3600 - 9
    with Decoder(DecodeLimits(memory_bytes=2 << 30)) as decoder:
        peaks = []
        for start_s in (0, 100, last_s // 2, last_s):
            window = decoder.decode(path, request(start_s, 8.0, SLOW_GRID, sound=True))
            shown = [number_in(frame) for frame in window.frames[0]]
            assert shown == [(start_s + k) % 1024 for k in range(8)]
            assert window.audio is not None
            peaks.append(peak_mib(decoder.child_pid))
    assert max(peaks) < 300, peaks
    assert peak_mib(os.getpid()) - before_mib < 200


def test_a_file_of_4k_pictures_costs_bounded_memory(tmp_path: Path) -> None:
    dark, bright = (np.full((2304, 4096, 3), level, np.uint8) for level in (40, 210))
    path = write_clip(tmp_path / "wide.mp4", [dark, bright] * 4, None, frame_rate=1, group=8)
    with Decoder(DecodeLimits(memory_bytes=2 << 30)) as decoder:
        window = decoder.decode(path, replace(request(0, 8.0, SLOW_GRID), max_pixels=4096 * 2304))
        assert [int(frame.mean() > 120) for frame in window.frames[0]] == [0, 1] * 4
        assert peak_mib(decoder.child_pid) < 500


def test_fault_06_a_file_without_an_index_is_read_at_the_right_time(tmp_path: Path) -> None:
    """As a browser records: no cues, no length."""
    path = numbered_clip(tmp_path / "live.webm", video_codec="libvpx", audio_codec="libopus")
    content = bytearray(path.read_bytes())
    cues = content.rindex(b"\x1c\x53\xbb\x6b")
    # Void takes the place of the cues, and the table at the head that points there becomes void too.
    content[cues : cues + 4] = b"\xec\x10" + struct.pack(">H", 0)
    head = content.index(b"\x11\x4d\x9b\x74")
    del content[cues:]
    content[head : head + 4] = b"\xec\x40\x00\x00"
    path.write_bytes(content)
    for start_s in (0.0, 7.0, 16.0):
        with path.open("rb") as file:
            frames = media.read_window(file, request(start_s)).frames[0]
        shown = [number_in(frame) for frame in frames]
        expected = [round(start_s * RATE_HZ) + k for k in range(GRID.num_frames)]
        assert np.abs(np.subtract(shown, expected)).max() <= 1
