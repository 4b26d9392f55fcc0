"""A file's score: known windows, the video's own sound or another, refusals with a reason."""

from pathlib import Path

import numpy as np
import pytest

from models.reward import Reward
from models.spec import SPECS
from pipelines.data.demo_world import render_clip
from pipelines.data.media_write import encode_flac, wav_bytes, write_mp4
from pipelines.errors import InputError
from pipelines.scoring import score_file, window_times
from tests.demo_factory import write_demo_video, write_untrained_reward

TINY = SPECS["tiny"]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Reward:
    return Reward.load(write_untrained_reward(tmp_path_factory.mktemp("reward") / "reward"))


@pytest.mark.parametrize(
    ("duration_s", "expected"),
    [(1.0, [0.0]), (2.5, [0.0]), (2.6, [0.0]), (5.0, [0.0, 2.5]), (6.0, [0.0, 2.5, 3.5]), (7.5, [0.0, 2.5, 5.0])],
)
def test_windows_cover_a_file_end_to_end(duration_s: float, expected: list[float]) -> None:
    assert window_times(duration_s, 2.5) == pytest.approx(expected)


def test_a_sound_in_a_file_of_its_own_scores_as_it_does_under_the_picture(reward: Reward, tmp_path: Path) -> None:
    clip = render_clip(0, 0)
    write_mp4(tmp_path / "clip.mp4", clip.frames, 16, clip.wave, 16_000)
    (tmp_path / "sound.flac").write_bytes(encode_flac(clip.wave, 16_000))
    (tmp_path / "sound.wav").write_bytes(wav_bytes(clip.wave, 16_000))
    video = str(tmp_path / "clip.mp4")
    own = score_file(reward, TINY, video=video, audio=None).windows[0]
    flac = score_file(reward, TINY, video=video, audio=str(tmp_path / "sound.flac")).windows[0]
    wav = score_file(reward, TINY, video=video, audio=str(tmp_path / "sound.wav")).windows[0]
    assert flac == wav
    # AAC changes the sound a little, not the verdict.
    assert own.total == pytest.approx(flac.total, abs=0.25)
    assert own.invalid_reason is None


def test_the_score_is_that_of_the_reward_on_the_stored_clip(reward: Reward, tmp_path: Path) -> None:
    import torch

    from pipelines.data.frames import decode_frames, encode_jpeg
    from pipelines.file_clips import FileClips

    video = write_demo_video(tmp_path / "clip.mp4")
    wave = render_clip(0, 0).wave
    (tmp_path / "sound.wav").write_bytes(wav_bytes(wave, 16_000))
    with FileClips(TINY) as clips:
        frames = clips.frames(str(video), 0.0)
    assert np.abs(frames.astype(int) - decode_frames([encode_jpeg(f) for f in render_clip(0, 0).frames])).mean() < 6
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    expected = reward.score(reward.video_features(pixels[None]), torch.from_numpy(wave)[None], 16_000)[0]
    found = score_file(reward, TINY, video=str(video), audio=str(tmp_path / "sound.wav")).windows[0]
    assert found.total == pytest.approx(expected.total, abs=0.01)
    assert found.offset_s == expected.offset_s


def test_a_long_file_is_scored_window_by_window(reward: Reward, tmp_path: Path) -> None:
    score = score_file(reward, TINY, video=str(write_demo_video(tmp_path / "long.mp4", 6.0)), audio=None)
    assert [w.start_s for w in score.windows] == pytest.approx([0.0, 2.5, 3.5], abs=0.07)
    totals = [w.total for w in score.windows if w.total is not None]
    assert score.mean("total") == pytest.approx(np.mean(totals))
    assert score.worst == min(totals)
    assert len(score.to_json()["windows"]) == 3  # pyright: ignore[reportArgumentType]


def test_silence_is_refused_with_its_reason_and_has_no_number(reward: Reward, tmp_path: Path) -> None:
    video = write_demo_video(tmp_path / "clip.mp4")
    (tmp_path / "silence.wav").write_bytes(wav_bytes(np.zeros(40_000, np.float32), 16_000))
    score = score_file(reward, TINY, video=str(video), audio=str(tmp_path / "silence.wav"))
    assert score.windows[0].invalid_reason == "silent"
    assert score.mean("total") is None
    assert score.worst is None


def test_files_that_cannot_be_scored_are_named_with_the_reason(reward: Reward, tmp_path: Path) -> None:
    video = str(write_demo_video(tmp_path / "clip.mp4"))
    (tmp_path / "sound.wav").write_bytes(wav_bytes(np.ones(16, np.float32) * 0.1, 16_000))
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(InputError, match=r"absent\.mp4 cannot be scored \(missing"):
        score_file(reward, TINY, video=str(tmp_path / "absent.mp4"), audio=None)
    with pytest.raises(InputError, match=r"text\.wav cannot be scored \(not_media"):
        score_file(reward, TINY, video=video, audio=str(tmp_path / "text.wav"))
    with pytest.raises(InputError, match="no_video"):
        score_file(reward, TINY, video=str(tmp_path / "sound.wav"), audio=video)
