"""A video gets a new sound: its picture untouched, its length kept, the same command the same sound."""

import hashlib
from pathlib import Path

import av
import numpy as np
import pytest

from models.policy import Policy
from models.reward import Reward
from pipelines.data.demo_world import render_clip
from pipelines.data.media_write import picture_duration_s, write_mp4
from pipelines.data.units import HERE
from pipelines.errors import InputError
from pipelines.generation import GenerationSettings, Generator, generate
from pipelines.preferences.candidates import Sampling
from tests.demo_factory import write_demo_video, write_untrained_policy, write_untrained_reward

RATE_HZ = 16_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Reward]:
    root = tmp_path_factory.mktemp("models")
    return Policy.load(write_untrained_policy(root / "policy")), Reward.load(write_untrained_reward(root / "reward"))


def settings(seed: int = 0, num_candidates: int = 1, encoders: str = "grids") -> GenerationSettings:
    return GenerationSettings(
        prompt="",
        encoders=encoders,
        seed=seed,
        sampling=Sampling(num_steps=2, guidance=1.0),
        num_candidates=num_candidates,
    )


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
def test_the_picture_is_copied_and_the_sound_as_long_as_it(
    models: tuple[Policy, Reward], tmp_path: Path, seconds: float
) -> None:
    video = write_demo_video(tmp_path / "in.mp4", seconds)
    made = generate(Generator(models[0], None, settings()), settings(), video=str(video), out=str(tmp_path / "out.mp4"))
    assert picture_packets(tmp_path / "out.mp4") == picture_packets(video)
    assert made.duration_s == pytest.approx(picture_duration_s(video))
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.audio[0]
        length_s = float(stream.duration * stream.time_base)
    # One AAC frame is 1024 samples.
    assert length_s == pytest.approx(made.duration_s, abs=1024 / RATE_HZ)
    assert made.num_windows == {1.0: 1, 2.5: 1, 6.3: 3}[seconds]
    assert not list(tmp_path.glob("*.part"))


def test_a_video_without_sound_is_accepted(models: tuple[Policy, Reward], tmp_path: Path) -> None:
    whole = write_demo_video(tmp_path / "whole.mp4")
    silent = tmp_path / "silent.mp4"
    with av.open(str(whole)) as source, av.open(str(silent), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    generator = Generator(models[0], None, settings())
    generate(generator, settings(), video=str(silent), out=str(tmp_path / "a.mp4"))
    generate(generator, settings(), video=str(whole), out=str(tmp_path / "b.mp4"))
    # The picture decides alone: the source's own sound is not listened to.
    assert np.array_equal(sound(tmp_path / "a.mp4"), sound(tmp_path / "b.mp4"))


def test_the_same_seed_gives_the_same_file_and_another_seed_another_sound(
    models: tuple[Policy, Reward], tmp_path: Path
) -> None:
    video = write_demo_video(tmp_path / "in.mp4")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        generator = Generator(models[0], None, settings(seed))
        generate(generator, settings(seed), video=str(video), out=str(tmp_path / f"{name}.mp4"))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert not np.array_equal(sound(tmp_path / "a.mp4"), sound(tmp_path / "c.mp4"))


def test_a_reward_never_picks_a_worse_candidate_than_the_first(models: tuple[Policy, Reward], tmp_path: Path) -> None:
    video = write_demo_video(tmp_path / "in.mp4", 5.0)
    rewards = []
    for count in (1, 4):
        generator = Generator(models[0], models[1], settings(num_candidates=count))
        made = generate(generator, settings(num_candidates=count), video=str(video), out=str(tmp_path / f"{count}.mp4"))
        rewards.append([-np.inf if r is None else r for r in made.rewards])
    assert len(rewards[0]) == 3
    assert all(best >= first - 1e-6 for first, best in zip(*rewards, strict=True))
    assert rewards[0] != rewards[1]


def test_several_candidates_without_a_reward_are_refused(models: tuple[Policy, Reward]) -> None:
    with pytest.raises(InputError, match="needs --reward"):
        Generator(models[0], None, settings(num_candidates=2))


def test_unusable_files_leave_no_output(models: tuple[Policy, Reward], tmp_path: Path) -> None:
    generator = Generator(models[0], None, settings())
    (tmp_path / "text.mp4").write_text("not a video")
    for name, reason in (("text.mp4", "text.mp4"), ("absent.mp4", "missing")):
        with pytest.raises(InputError, match=reason):
            generate(generator, settings(), video=str(tmp_path / name), out=str(tmp_path / "out.mp4"))
    video = write_demo_video(tmp_path / "in.mp4")
    with pytest.raises(InputError, match="folder that exists"):
        generate(generator, settings(), video=str(video), out=str(tmp_path / "no" / "out.mp4"))
    assert not (tmp_path / "out.mp4").exists()


def test_the_frames_and_conditions_are_those_that_preprocess_stores(tmp_path: Path) -> None:
    from models.encoders import build_encoders
    from models.spec import SPECS
    from pipelines.data.frames import decode_frames
    from pipelines.data.manifest import list_videos
    from pipelines.data.preprocess import PreprocessSettings, preprocess
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
    assert np.array_equal(window.frames, decode_frames(row["frames"]))
    for name in ("clip_features", "sync_features", "text_features"):
        stored = np.asarray(row[name], np.float16).reshape(vars(window.conditions)[name].shape)
        assert np.array_equal(vars(window.conditions)[name], stored)
