"""Names from outside: addresses that may be opened, and keys that can be stored and printed."""

import os
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.names import clip_key, resolve, start_padded, stem_of, suffix_of

NAMES = st.binary(min_size=1, max_size=40).filter(lambda b: b"/" not in b and b"\0" not in b).map(os.fsdecode)


@pytest.mark.parametrize(
    "video", ["a.mp4", "./a: b.mp4", "sub/x.mp4", "-x.mp4", "a..b/c.mp4", "12:30.mp4", "日本/é.mp4", "100%#1?.mp4"]
)
@pytest.mark.parametrize("base", ["/data", "s3://bucket/data"])
def test_ordinary_names_are_files_under_the_manifest(video: str, base: str) -> None:
    assert resolve(video, base) == (f"{base}/{video.removeprefix('./')}", None)
    assert resolve(f"x//../{video}", base) == (f"{base}/{video.removeprefix('./')}", None)


def test_objects_are_opened_by_their_uri_and_their_keys_are_taken_as_they_stand() -> None:
    for uri in ("s3://bucket/a.mp4", "s3://my.bucket-1/a b/é%20#?.mp4"):
        assert resolve(uri, "/data") == (uri, None)


@given(NAMES)
def test_every_name_gives_a_printable_key_that_can_be_stored(name: str) -> None:
    key = clip_key(name + ".mp4")
    assert key.isprintable()
    assert "/" not in key
    key.encode()


@given(NAMES.filter(lambda name: name not in (".", "..")))
def test_stems_and_suffixes_are_those_of_the_file_system(name: str) -> None:
    path = PurePosixPath("folder.x") / name
    assert stem_of(f"folder.x/{name}") == path.stem
    assert suffix_of(f"folder.x/{name}") == path.suffix.lower()


@pytest.mark.parametrize(
    ("video", "key"),
    [
        ("dir/-2xQ_a_000030.mp4", "-2xQ_a_000030"),
        ("a b.c.mp4", "a b.c"),
        ("e\u0301.mp4", "é"),
        ("two\nlines.mp4", "two%0Alines"),
        ("tab\t\u200f.mp4", "tab%09%E2%80%8F"),
        (os.fsdecode(b"bytes\xff.mp4"), "bytes%FF"),
        ("😀.mp4", "😀"),
        ("s3://bucket/x/y.webm", "y"),
        ("shard.tar!/folder/s1.mp4", "s1"),
        ("..", ".."),
        ("x/", "x"),
        ("/", "%2F"),
    ],
)
def test_the_key_is_the_stem_in_printable_form(video: str, key: str) -> None:
    assert clip_key(video) == key


@pytest.mark.parametrize(
    ("key", "padded"),
    [
        ("-2xQ_a_cdef_30", "-2xQ_a_cdef_000030"),
        ("-2xQ_a_cdef_000030", "-2xQ_a_cdef_000030"),
        ("___________0_7", "___________0_7"),
        ("demo_7", "demo_7"),
        ("abcdefghijk", "abcdefghijk"),
    ],
)
def test_only_the_start_behind_an_id_of_eleven_characters_is_padded(key: str, padded: str) -> None:
    assert start_padded(key) == padded
