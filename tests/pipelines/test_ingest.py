"""The one door: what goes together, and what has to be said."""

from pathlib import Path

import pytest

from pipelines.data.ingest import Sources, gather_entries
from pipelines.errors import InputError
from tests.pipelines.tar_factory import write_tar


def test_a_manifest_a_folder_and_a_tar_give_their_clips(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "clips.csv").write_text("video\na.mp4\n")
    write_tar(tmp_path / "shards" / "s.tar", {"b.mp4": b"x"})
    for options, kind, videos in (
        ({"manifest": "clips.csv"}, "manifest", ["a.mp4"]),
        ({"videos": "."}, "folder", ["a.mp4", "shards/s.tar!/b.mp4"]),
        ({"videos": "shards/s.tar"}, "folder", ["s.tar!/b.mp4"]),
    ):
        places = {name: str(tmp_path / place) for name, place in options.items()}
        entries = gather_entries(Sources(**places, default_split="val"))
        assert (entries.kind, entries.num_excluded) == (kind, {})
        assert [(r["video"], r["split"]) for r in entries.rows()] == [(video, "val") for video in videos]


def test_a_relative_manifest_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clips.csv").write_text("video\na.mp4\n")
    monkeypatch.chdir(tmp_path)
    (row,) = gather_entries(Sources(manifest="clips.csv")).rows()
    assert row["uri"] == f"{tmp_path}/a.mp4"


def test_nothing_to_process_is_wrong_input() -> None:
    with pytest.raises(InputError, match="give --manifest, --videos, or both"):
        gather_entries(Sources())
