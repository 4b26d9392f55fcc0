"""A video gets a new sound: its picture untouched, its length kept, the same command the same sound."""

import hashlib
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from models.spec import SPECS
from pipelines.data.demo_world import render_clip
from pipelines.data.media_stream import picture_duration_s
from pipelines.data.media_write import decode_flac, write_mp4
from pipelines.data.units import HERE
from pipelines.errors import EnvironmentFailed, InputError
from pipelines.generation import FADE_S, Generated, GenerationInputs, _spool, generate, plan_windows
from pipelines.generation_steps import GenerationSettings
from pipelines.preferences.candidates import Sampling
from tests.demo_factory import write_demo_video, write_untrained_policy, write_untrained_reward
from tests.pipelines.clip_factory import grey_frames, tone, write_clip

RATE_HZ = 16_000
PLAIN = GenerationSettings(
    prompt="",
    negative_prompt="",
    encoders=None,
    seed=0,
    sampling=Sampling(num_steps=2, guidance=1.0),
    num_candidates=1,
    bf16=False,
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_untrained_policy(tmp_path_factory.mktemp("models") / "policy"))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_untrained_reward(tmp_path_factory.mktemp("models") / "reward"))


def generated(policy: str, video: Path, out: Path, settings: GenerationSettings = PLAIN) -> Generated:
    return generate(GenerationInputs(policy=policy, video=str(video)), settings, out=str(out))


def picture_packets(path: Path) -> list[tuple[int, int | None, str]]:
    """Size, presentation time and hash of each picture packet."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size]
        return [(p.size, p.pts, hashlib.sha256(bytes(p)).hexdigest()) for p in packets]


def sound(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


@pytest.mark.parametrize("seconds", [1.0, 2.5, 6.3])
def test_the_picture_is_copied_and_the_sound_as_long_as_it(policy: str, tmp_path: Path, seconds: float) -> None:
    video = write_demo_video(tmp_path / "in.mp4", seconds)
    made = generated(policy, video, tmp_path / "out.mp4")
    assert picture_packets(tmp_path / "out.mp4") == picture_packets(video)
    assert made.duration_s == pytest.approx(picture_duration_s(video))
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.audio[0]
        length_s = float(stream.duration * stream.time_base)
    # One AAC frame is 1024 samples.
    assert length_s == pytest.approx(made.duration_s, abs=1024 / RATE_HZ)
    assert made.num_windows == {1.0: 1, 2.5: 1, 6.3: 3}[seconds]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_the_sound_alone_is_that_under_the_picture_to_the_sample(policy: str, tmp_path: Path) -> None:
    video = write_demo_video(tmp_path / "in.mp4", 4.0)
    for name in ("a.wav", "a.flac", "a.mp4"):
        generated(policy, video, tmp_path / name)
    samples = decode_flac((tmp_path / "a.flac").read_bytes())
    assert len(samples) == round(picture_duration_s(video) * RATE_HZ)
    assert np.array_equal(sound(tmp_path / "a.wav").astype(np.float32) / 32768, samples)
    heard = sound(tmp_path / "a.mp4")[: len(samples)]
    assert np.corrcoef(heard, samples[: len(heard)])[0, 1] > 0.9


def test_what_is_heard_in_the_video_makes_no_difference_be_it_silent_or_absent(policy: str, tmp_path: Path) -> None:
    clip = render_clip(0, 3)
    wave = clip.wave[None]
    for name, own in (("loud", wave), ("silent", 0 * wave), ("mute", None)):
        write_clip(tmp_path / f"{name}.mp4", list(clip.frames), own, frame_rate=16, rate_hz=RATE_HZ)
        generated(policy, tmp_path / f"{name}.mp4", tmp_path / f"{name}.flac")
    assert len({(tmp_path / f"{name}.flac").read_bytes() for name in ("loud", "silent", "mute")}) == 1


def test_the_same_seed_gives_the_same_file_and_another_seed_another_sound(policy: str, tmp_path: Path) -> None:
    video = write_demo_video(tmp_path / "in.mp4")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        generated(policy, video, tmp_path / f"{name}.mp4", replace(PLAIN, seed=seed))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert not np.array_equal(sound(tmp_path / "a.mp4"), sound(tmp_path / "c.mp4"))


def test_step_by_step_the_file_is_the_same_bit_for_bit_and_nothing_else_stays(
    policy: str, reward: str, tmp_path: Path
) -> None:
    video = write_demo_video(tmp_path / "in.mp4", 5.0)
    settings = replace(
        PLAIN, num_candidates=2, prompt="a bell", negative_prompt="a drum", sampling=Sampling(num_steps=2, guidance=2.0)
    )
    inputs = GenerationInputs(policy=policy, reward=reward, video=str(video))
    told: list[tuple[str, int, int]] = []
    together = generate(inputs, settings, out=str(tmp_path / "a.mp4"))
    in_turn = generate(
        inputs, settings, out=str(tmp_path / "b.mp4"), offload=True, progress=lambda *step: told.append(step)
    )
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert in_turn.rewards == together.rewards
    assert told == [(step, i, 3) for step in ("conditions", "latents", "sound") for i in (1, 2, 3)]
    assert [name for name, _ in together.peaks] == ["conditions, latents, sound"]
    assert [name for name, _ in in_turn.peaks] == ["conditions", "latents", "sound"]
    assert all(peak.process_bytes > 10_000_000 for _, peak in in_turn.peaks)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "in.mp4"]


def test_words_alone_give_a_sound_of_the_duration_asked_for(policy: str, tmp_path: Path) -> None:
    for name, prompt in (("a", "a bell"), ("b", "a bell"), ("c", "rain")):
        settings = replace(PLAIN, prompt=prompt)
        made = generate(
            GenerationInputs(policy=policy, duration_s=4.5), settings, out=str(tmp_path / f"{name}.flac"), offload=True
        )
        assert (made.num_windows, made.duration_s) == (2, 4.5)
    a, b, c = (decode_flac((tmp_path / f"{name}.flac").read_bytes()) for name in "abc")
    assert len(a) == round(4.5 * RATE_HZ)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert np.isfinite(a).all()
    assert a.std() > 0


def test_a_reward_never_picks_a_worse_candidate_than_the_first(policy: str, reward: str, tmp_path: Path) -> None:
    video = write_demo_video(tmp_path / "in.mp4", 5.0)
    inputs = GenerationInputs(policy=policy, reward=reward, video=str(video))
    rewards = []
    for count in (1, 4):
        made = generate(inputs, replace(PLAIN, num_candidates=count), out=str(tmp_path / f"{count}.mp4"))
        rewards.append([-np.inf if r is None else r for r in made.rewards])
    assert len(rewards[0]) == 3
    assert all(best >= first - 1e-6 for first, best in zip(*rewards, strict=True))
    assert rewards[0] != rewards[1]


def test_windows_cover_any_duration_and_share_their_joints() -> None:
    tiny = SPECS["tiny"]
    for duration_s in (1e-6, 0.3, 2.5, 2.6, 600.0, 36_000.0):
        plan = plan_windows(duration_s, tiny)
        assert plan.total == max(round(duration_s * RATE_HZ), 1)
        assert plan.starts[0] == 0
        assert plan.starts[-1] + tiny.num_samples >= plan.total
        assert all(
            b - a <= tiny.num_samples - FADE_S * RATE_HZ for a, b in zip(plan.starts, plan.starts[1:], strict=False)
        )


def test_requests_that_cannot_be_met_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    video = write_demo_video(tmp_path / "in.mp4")
    absent = str(tmp_path / "absent_policy")
    for words, duration_s in ((None, None), (str(video), 3.0)):
        with pytest.raises(InputError, match="either --video"):
            GenerationInputs(policy=absent, video=words, duration_s=duration_s)
    for duration_s in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="positive number of seconds"):
            GenerationInputs(policy=absent, duration_s=duration_s)
    with pytest.raises(InputError, match="--reward judges sound against a picture"):
        GenerationInputs(policy=absent, duration_s=3.0, reward="r")
    with_video = GenerationInputs(policy=absent, video=str(video))
    without = GenerationInputs(policy=absent, duration_s=3.0)
    with pytest.raises(InputError, match="needs --reward"):
        generate(with_video, replace(PLAIN, num_candidates=2), out=str(tmp_path / "out.mp4"))
    for inputs, out, reason in (
        (with_video, tmp_path / "no" / "out.mp4", "folder that exists"),
        (with_video, "s3://bucket/out.mp4", "local folder"),
        (with_video, tmp_path, "is a folder"),
        (with_video, tmp_path / "out.mp3", r"must end in \.mp4"),
        (with_video, video, "is the video itself"),
        (without, tmp_path / "out.mp4", r"end it in \.wav or \.flac"),
    ):
        with pytest.raises(InputError, match=reason):
            generate(inputs, PLAIN, out=str(out))
    assert [p.name for p in tmp_path.iterdir()] == ["in.mp4"]


def test_a_wav_that_would_be_too_long_for_its_format_is_refused(policy: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"too long for a wav; end it in \.flac"):
        generate(GenerationInputs(policy=policy, duration_s=140_000.0), PLAIN, out=str(tmp_path / "a.wav"))


def test_unusable_files_leave_no_output(policy: str, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    write_clip(tmp_path / "heard.mp4", None, tone(2.0, 48_000))
    whole = write_clip(tmp_path / "whole.mp4", grey_frames([50] * 100), tone(4.0, 48_000))
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    before = sorted(p.name for p in tmp_path.iterdir())
    for name, reason in (
        ("text.mp4", "text.mp4"),
        ("absent.mp4", r"absent.mp4 cannot be used \(missing\)"),
        ("heard.mp4", "heard.mp4 has no moving picture"),
        ("cut.mp4", r"cut.mp4 cannot be read: truncated"),
    ):
        for offload in (False, True):
            with pytest.raises(InputError, match=reason):
                generate(
                    GenerationInputs(policy=policy, video=str(tmp_path / name)),
                    PLAIN,
                    out=str(tmp_path / "out.mp4"),
                    offload=offload,
                )
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_frames_and_conditions_are_those_that_preprocess_stores(tmp_path: Path) -> None:
    from models.encoders import build_encoders
    from pipelines.data.frames import decode_frames
    from pipelines.data.media_folder import list_videos
    from pipelines.data.preprocess import preprocess
    from pipelines.data.preprocess_settings import PreprocessSettings
    from pipelines.file_clips import FileClips

    clip = render_clip(0, 3)
    (tmp_path / "videos").mkdir()
    write_mp4(tmp_path / "videos" / "one.mp4", clip.frames, 16, clip.wave, RATE_HZ)
    dataset = preprocess(
        list_videos(str(tmp_path / "videos")),
        PreprocessSettings(spec="tiny", encoders="grids"),
        out=str(tmp_path / "features"),
        pool=HERE,
    )
    row = dataset.read().to_pylist()[0]
    with FileClips(SPECS["tiny"]) as clips:
        encoders = build_encoders("grids", SPECS["tiny"])
        window = clips.picture(str(tmp_path / "videos" / "one.mp4"), 0.0, encoders, row["caption"])
    assert window.frames is not None
    assert np.array_equal(window.frames, decode_frames(row["frames"]))
    for name in ("clip_features", "sync_features", "text_features"):
        stored = np.asarray(row[name], np.float16).reshape(vars(window.conditions)[name].shape)
        assert np.array_equal(vars(window.conditions)[name], stored)


def test_what_a_killed_run_left_in_its_spool_is_not_taken_for_this_one(tmp_path: Path) -> None:
    left = tmp_path / "out.mp4.spool" / "latents-000000.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"of another prompt")
    with _spool(tmp_path / "out.mp4") as folder:
        assert folder == left.parent
        assert not list(folder.iterdir())
    assert not left.parent.exists()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentFailed, match="cannot make"), _spool(tmp_path / "file" / "out.mp4"):
        pass
