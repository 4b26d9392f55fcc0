"""A short fuzz run, the files of earlier runs that found something, and what the fuzzer itself promises.

The long run is `make fuzz`; what it finds goes into `tests/fixtures/fuzz` and into the table below.
"""

from pathlib import Path

import numpy as np
import pytest

from pipelines.data.contracts import FEATURES
from pipelines.data.store import Dataset
from tests.faults.media_faults import made, outcomes
from tests.fuzz.checks import breaches
from tests.fuzz.containers import KINDS, fields_of
from tests.fuzz.media import fuzz
from tests.fuzz.mutators import MUTATORS, UNTOUCHED_EVERY, Workshop, make_mutant
from tests.fuzz.seeds import SEEDS, write_seeds

FOUND = {
    # A frame that lasts months: one small file was planned as millions of windows.
    "years.avi": "truncated",
    # The picture's own headers declare what the container does not: told as damage, not as size.
    "vast_vp8.webm": "too_large",
    "vast_h264.mp4": "too_large",
    # An avi says how long it should be, and was called too short.
    "cut.avi": "truncated",
    # A container without a stream was called no_video.
    "no_streams.mp4": "empty",
    # Frames that an avi lost made all later ones early.
    "lost_frames.avi": "truncated",
    # Damaged AAC decodes to 26 channels for a moment, and PyAV reads past its planes: the child died.
    "many_planes.mp4": "truncated",
    # Sound of 8 Hz was resampled to 6000 times its size, 3 GB of it.
    "eight_hz.mkv": "unsupported_codec",
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return write_seeds(tmp_path_factory.mktemp("seeds"))


def test_mutants_of_every_container_end_as_rows_or_rejects_and_nothing_is_lost(tmp_path: Path) -> None:
    # One batch of first windows, and a few files cut into all of theirs.
    tally = fuzz([*range(120), *range(600, 630)], run_seed=7, folder=tmp_path, num_processes=2)
    assert not tally.problems
    assert tally.files == 150
    assert tally.reasons["row"] > 20
    assert tally.reasons["truncated"] > 20
    assert len(tally.reasons) >= 4


def test_files_that_once_found_something_are_judged_as_they_should_be(tmp_path: Path, fixtures: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in FOUND:
        (clips / name).write_bytes((fixtures / "fuzz" / name).read_bytes())
    for windows, hop_s in (("first", None), ("all", 1.0)):
        dataset = made(clips, out=windows, windows=windows, hop_s=hop_s)
        assert not breaches(dataset, {Path(name).stem for name in FOUND})
        told = outcomes(dataset)
        # As many as its bytes may hold, not as many as its header says.
        assert sum(clip.startswith("years") for clip in told) <= 12_000 / 32
        for name, reason in FOUND.items():
            mine = {outcome for clip, outcome in told.items() if clip.partition("#")[0] == Path(name).stem}
            assert mine == {reason}, name


def test_all_that_a_run_may_find_is_found_again_by_its_number(seeds: dict[str, bytes]) -> None:
    mutants = [make_mutant(seeds, 3, index) for index in range(200)]
    assert all(make_mutant(seeds, 3, m.index) == m for m in mutants[::17])
    assert all(make_mutant(seeds, 4, m.index).content != m.content for m in mutants[1:40])
    untouched = [m for m in mutants if not m.steps]
    assert [m.index for m in untouched] == list(range(0, 200, UNTOUCHED_EVERY))
    assert all(m.content == seeds[m.seed_name] for m in untouched)
    assert {m.seed_name for m in mutants} == {seed.name for seed in SEEDS}


@pytest.mark.parametrize("name", sorted(MUTATORS))
def test_a_mutator_changes_any_file_and_survives_one_of_no_bytes(name: str, seeds: dict[str, bytes]) -> None:
    for source in ("h264_aac.mp4", "vp9_opus.webm", "mpeg4_mp3.avi", "opus.ogg"):
        changed = [
            MUTATORS[name](Workshop(seeds, np.random.default_rng(i)), seeds[source])[0] != seeds[source]
            for i in range(20)
        ]
        assert sum(changed) >= 10, source
    MUTATORS[name](Workshop(seeds, np.random.default_rng(0)), b"")


@pytest.mark.parametrize("name", ["h264_aac.mp4", "h264_fragments.mp4", "vp9_opus.webm", "mpeg4_mp3.avi"])
def test_the_walkers_find_every_kind_of_field_and_stand_damage(name: str, seeds: dict[str, bytes]) -> None:
    content = seeds[name]
    fields = fields_of(content)
    assert {field.kind for field in fields} == set(KINDS)
    assert all(field.offset >= 0 and field.offset + field.length <= len(content) for field in fields)
    for cut in range(0, len(content), 997):
        assert all(field.offset + field.length <= cut for field in fields_of(content[:cut]))


def test_the_checks_see_a_lost_clip_a_double_one_and_a_foreign_one(tmp_path: Path, seeds: dict[str, bytes]) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for stem in ("a", "b"):
        (clips / f"{stem}.mp4").write_bytes(seeds["h264_aac.mp4"])
    dataset = made(clips)
    assert not breaches(dataset, {"a", "b"})
    assert breaches(dataset, {"a", "b", "c"}) == ["c is in neither features nor rejects"]
    assert breaches(dataset, {"a"}) == ["b was never given"]
    twice = Dataset(dataset.folder, {**dataset.manifest, "parts": 2 * dataset.manifest["parts"]}, FEATURES)
    assert {f"{clip} is told of more than once" for clip in ("a", "b")} <= set(breaches(twice, {"a", "b"}))
