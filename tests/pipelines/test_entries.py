"""Entries: columns that lose nothing, repeats counted once, a fingerprint of what is said and not of where it lies."""

import os
import random

import pytest

from pipelines.data.entries import ENTRY_SCHEMA, EntryBuilder, Piece, name_bytes, text_of
from pipelines.errors import InputError
from tests.pipelines.entry_factory import entries_of

ODD = os.fsdecode(b"d\xff/\xe9.mp4")


def test_a_row_comes_back_as_it_was_given() -> None:
    events = [{"time_s": 0.5, "duration_s": 0.1, "kind": "ball", "variant": "red"}]
    given = {
        "line": 7,
        "video": ODD,
        "piece": Piece("/data/" + ODD, 512, 1 << 40),
        "member": ODD,
        "sound": Piece("/data/x.wav", 3, 4),
        "start_s": 1.5,
        "duration_s": 2.5,
        "caption": "é\nß",
        "split": "val",
        "events": '[{"time_s": 0.5, "duration_s": 0.1, "kind": "ball", "variant": "red"}]',
        "problem": ("silent", "why"),
    }
    builder = EntryBuilder()
    builder.add(**given)
    entries = builder.finish(kind="manifest", location="x")
    assert entries.table.schema == ENTRY_SCHEMA
    (row,) = entries.rows()
    assert (row["video"], row["uri"], row["member"]) == (ODD, "/data/" + ODD, ODD)
    assert (row["offset"], row["size_bytes"]) == (512, 1 << 40)
    assert (row["sound_uri"], row["sound_offset"], row["sound_size_bytes"]) == ("/data/x.wav", 3, 4)
    assert (row["start_s"], row["duration_s"], row["caption"], row["split"]) == (1.5, 2.5, "é\nß", "val")
    assert (row["events"], row["reason"], row["detail"]) == (events, "silent", "why")


def test_names_survive_and_captions_are_made_utf_8() -> None:
    assert text_of(name_bytes(ODD)) == ODD
    caption = os.fsdecode(b"caf\xe9") + "\ud800"
    (row,) = entries_of({"video": "a.mp4", "caption": caption}).rows()
    assert row["caption"] == "caf\ufffd\ufffd"


def test_the_first_of_repeats_stays_and_the_rest_is_counted() -> None:
    entries = entries_of(
        {"video": "a.mp4", "caption": "one"},
        {"video": "b.mp4"},
        {"video": "a.mp4", "caption": "two"},
        {"video": "a.mp4", "start_s": 1.0},
        {"video": "a.mp4", "duration_s": 2.0},
        {"video": "a.mp4", "duration_s": 2.0},
    )
    assert [(r["line"], r["caption"]) for r in entries.rows()] == [(1, "one"), (2, ""), (4, ""), (5, "")]
    assert entries.num_repeated == 2


def test_members_of_one_tar_are_files_of_their_own() -> None:
    tar = "/data/x.tar"
    rows = [{"video": f"x.tar!/{i}.mp4", "piece": Piece(tar, 512 * i, 10)} for i in (1, 2, 2)]
    entries = entries_of(*rows)
    assert len(entries.rows()) == 2
    assert entries.num_repeated == 1


def test_the_fingerprint_ignores_order_and_place_and_nothing_else() -> None:
    rng = random.Random(0)
    rows = [
        {"video": f"{i}.mp4", "start_s": i / 2, "caption": f"c{i}", "split": rng.choice(["train", "val"])}
        for i in range(300)
    ]
    first = entries_of(*rows).fingerprint
    moved = [{**row, "piece": Piece(f"s3://bucket/{row['video']}")} for row in rows]
    assert entries_of(*moved).fingerprint == first
    shuffled = rng.sample(rows, len(rows))
    assert entries_of(*shuffled).fingerprint == first
    changes = [
        {"video": "other.mp4"},
        {"start_s": 9.0},
        {"duration_s": 3.0},
        {"caption": "x"},
        {"split": "test"},
        {"events": "[]"},
        {"problem": ("missing", "x")},
        {"sound": Piece("/data/7.wav")},
    ]
    others = {entries_of(*rows[:7], {**rows[7], **change}, *rows[8:]).fingerprint for change in changes}
    assert len(others) == len(changes)
    assert first not in others
    assert entries_of(*rows[:-1]).fingerprint != first


def test_missing_clips_are_counted_and_the_first_are_named() -> None:
    gone = {"problem": ("missing", "")}
    entries = entries_of({"video": "here.mp4"}, *({"video": f"gone\n{i}.mp4", **gone} for i in range(9)))
    assert entries.num_missing == 9
    assert entries.missing_names(2) == ["gone%0A0.mp4", "gone%0A1.mp4"]


def test_no_row_is_wrong_input() -> None:
    with pytest.raises(InputError, match="clips names no media file"):
        EntryBuilder().finish(kind="folder", location="clips")
