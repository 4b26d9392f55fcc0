"""Flash and beep in every container and codec that the wheel can write and the reader accepts.

A pair is left out when FFmpeg's table says that the container does not hold the codec, or when its muxer is listed
below as one that does not keep that promise, and for nothing else.
"""

from functools import cache
from pathlib import Path

import av
import pytest

from pipelines.data import media
from tests.pipelines.clip_factory import beep, grey_frames, write_clip
from tests.pipelines.test_media import FINE, ask, flash_s, onset_s

CONTAINERS = {"mp4": "mp4", "mov": "mov", "mkv": "matroska", "webm": "webm", "avi": "avi"}
VIDEO = {
    "libx264": "h264",
    "libx265": "hevc",
    "libvpx": "vp8",
    "libvpx-vp9": "vp9",
    "libsvtav1": "av1",
    "mpeg4": "mpeg4",
}
AUDIO = {
    "aac": "aac",
    "libmp3lame": "mp3",
    "libopus": "opus",
    "flac": "flac",
    "pcm_s16le": "pcm_s16le",
    "pcm_s24le": "pcm_s24le",
    "pcm_f32le": "pcm_f32le",
    "ac3": "ac3",
    "eac3": "eac3",
}
"""Encoders of the wheel and what they write. Its Vorbis is experimental and its DTS too: they are read, not written."""
WRITTEN_WRONG = {("mov", "opus"), ("mov", "flac"), ("mov", "vp8"), ("mov", "vp9"), ("mov", "av1"), ("avi", "eac3")}
"""What the muxer's table promises and the muxer then refuses (mov), or gives a wrong rate (E-AC-3 in AVI)."""


@cache
def supported(container: str) -> frozenset[str]:
    with av.open("/dev/null", "w", format=CONTAINERS[container]) as out:
        return frozenset(codec for codec in out.supported_codecs if (container, codec) not in WRITTEN_WRONG)


def pairs() -> list[tuple[str, str, str]]:
    return [
        (container, video, audio)
        for container in CONTAINERS
        for video, picture in VIDEO.items()
        for audio, sound in AUDIO.items()
        if {picture, sound} <= supported(container)
    ]


def diagonal() -> list[tuple[str, str, str]]:
    """Every container with each of its picture codecs and each of its sound codecs at least once."""
    chosen = []
    for container in CONTAINERS:
        mine = [pair for pair in pairs() if pair[0] == container]
        videos, audios = (list(dict.fromkeys(pair[place] for pair in mine)) for place in (1, 2))
        count = max(len(videos), len(audios))
        chosen += [(container, videos[i % len(videos)], audios[i % len(audios)]) for i in range(count)]
    return chosen


def check(folder: Path, container: str, video: str, audio: str) -> None:
    levels = [255 if 30 <= i < 35 else 20 for i in range(70)]
    path = write_clip(
        folder / f"clip.{container}",
        grey_frames(levels, 64, 64),
        beep(2.4, 48_000, 1.2),
        frame_rate=25,
        rate_hz=48_000,
        video_codec=video,
        audio_codec=audio,
    )
    window = ask(path, FINE)
    assert abs(flash_s(window, FINE) - onset_s(window)) < 0.020
    # t = 0 is the file's own start, which priming samples may put a little before the first frame.
    assert flash_s(window, FINE) == pytest.approx(1.2, abs=0.06)


def test_the_matrix_is_not_empty() -> None:
    assert len(pairs()) >= 100
    assert {pair[0] for pair in pairs()} == set(CONTAINERS)
    assert {pair[1] for pair in pairs()} == set(VIDEO)
    assert {pair[2] for pair in pairs()} == set(AUDIO)
    assert set(diagonal()) <= set(pairs())
    accepted = media.VIDEO_CODECS | media.AUDIO_CODECS
    assert set(VIDEO.values()) | set(AUDIO.values()) <= accepted


@pytest.mark.parametrize(("container", "video", "audio"), diagonal())
def test_fault_05_flash_and_beep_stay_within_20_ms(tmp_path: Path, container: str, video: str, audio: str) -> None:
    check(tmp_path, container, video, audio)


@pytest.mark.slow
def test_fault_05_flash_and_beep_stay_within_20_ms_in_every_pair_there_is(tmp_path: Path) -> None:
    failed = []
    for number, pair in enumerate(pairs()):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            check(folder, *pair)
        except AssertionError as error:
            failed.append((pair, str(error).splitlines()[0]))
    assert failed == []


def test_containers_that_are_not_on_the_list_are_refused(tmp_path: Path) -> None:
    """MPEG-TS, FLV and the like have more parsers than a corpus of clips needs."""
    for suffix, video in (("ts", "libx264"), ("flv", "libx264")):
        path = write_clip(
            tmp_path / f"clip.{suffix}", grey_frames([60] * 63), beep(2.5, 48_000, 1.0), video_codec=video
        )
        with pytest.raises(media.MediaError) as caught:
            ask(path, FINE)
        assert caught.value.reason == "not_media"
