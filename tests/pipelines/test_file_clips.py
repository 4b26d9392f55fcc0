"""Windows of a long file: each costs its own length, and the picture's conditions do not depend on who else looks."""

import io
from pathlib import Path

import numpy as np
import pytest

from models.encoders import build_encoders
from models.spec import SPECS
from pipelines.data import media
from pipelines.data.clip_worker import frame_grid
from pipelines.data.window import WindowRequest
from pipelines.file_clips import ALL_MAY_MISS, MAX_PIXELS, FileClips
from tests.demo_factory import write_demo_video
from tests.pipelines.clip_factory import grey_frames, write_clip

TINY = SPECS["tiny"]
FRAME_HZ = 8


class CountingFile(io.FileIO):
    """Counts the bytes that are read."""

    num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(-1 if size is None else size)
        self.num_read += len(content or b"")
        return content or b""


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten minutes of noise whose grey level in frame i is i mod 200, roughly; some megabytes."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 50, (64, 64, 3)).astype(np.uint8) for _ in range(16)]
    frames = [noise[i % 16] + np.uint8(i % 200) for i in range(600 * FRAME_HZ)]
    return write_clip(tmp_path_factory.mktemp("long") / "long.mp4", frames, None, frame_rate=FRAME_HZ, group=48)


@pytest.mark.parametrize("start_s", [30.0, 300.0, 590.0])
def test_a_late_window_reads_a_small_part_of_the_file(long_video: Path, start_s: float) -> None:
    grid = frame_grid(build_encoders("grids", TINY).grids[0], TINY)
    request = WindowRequest(
        start_s=start_s,
        duration_s=TINY.duration_s,
        grids=(grid,),
        audio_rate_hz=TINY.sample_rate_hz,
        audio_samples=0,
        max_pixels=MAX_PIXELS,
        max_missing=ALL_MAY_MISS,
    )
    with CountingFile(str(long_video), "rb") as file:
        window = media.read_window(file, request)
        assert 0 < file.num_read < 0.1 * long_video.stat().st_size
    # The right part of it: the picture's level tells its time.
    level = window.frames[0][0].mean() - 24.5
    assert level == pytest.approx(round(start_s * FRAME_HZ) % 200, abs=3)


def test_the_conditions_are_the_same_with_and_without_the_frames_of_the_reward(tmp_path: Path) -> None:
    video = str(write_demo_video(tmp_path / "in.mp4", 6.0))
    encoders = build_encoders("grids", TINY)
    with FileClips(TINY) as clips:
        for start_s in (0.0, 3.1):
            judged = clips.picture(video, start_s, encoders, "bell")
            alone = clips.picture(video, start_s, encoders, "bell", with_frames=False)
            assert alone.frames is None
            assert judged.frames is not None
            assert judged.frames.shape == (TINY.frames_len, TINY.frames_px, TINY.frames_px, 3)
            for name, values in vars(judged.conditions).items():
                assert np.array_equal(values, vars(alone.conditions)[name])


def test_a_window_past_the_end_shows_the_last_frame(tmp_path: Path) -> None:
    video = str(write_clip(tmp_path / "in.mp4", grey_frames([40] * 50 + [200] * 10), None, frame_rate=10))
    with FileClips(TINY) as clips:
        frames = clips.frames(video, 5.5)
    assert frames.mean() == pytest.approx(200, abs=4)
