"""Windows: which, under which keys, in which order; and that none lies across a cut or beyond its part."""

import math
import os
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.entries import Piece
from pipelines.data.names import clip_key
from pipelines.data.plan import (
    CUT_S,
    PLAN_SCHEMA,
    SURVEY_SCHEMA,
    FileSurvey,
    WindowChoice,
    files_to_survey,
    plan_row,
    plan_rows,
    plan_windows,
)
from pipelines.errors import InputError
from tests.pipelines.entry_factory import entries_of


def keys(*rows: dict[str, Any], clip_s: float = 2.5, **options: Any) -> list[tuple[str, float]]:
    plan = plan_windows(entries_of(*rows), clip_s=clip_s, **options)
    return list(zip(plan["clip_id"].to_pylist(), plan["start_s"].to_pylist(), strict=True))


def surveyed(lengths: dict[str, float], **cuts: tuple[float, ...]) -> dict[str, FileSurvey]:
    return {
        f"/data/{name}.mp4": FileSurvey(length_s=length, cuts_s=cuts.get(name, ())) for name, length in lengths.items()
    }


def test_one_window_has_the_bare_key_and_several_carry_their_start() -> None:
    assert keys({"video": "a.mp4", "start_s": 3.0}) == [("a", 3.0)]
    both = [{"video": "a.mp4"}, {"video": "b.mp4"}, {"video": "a.mp4", "start_s": 12.3456}]
    assert keys(*both) == [("a#0", 0.0), ("a#12346", 12.3456), ("b", 0.0)]


def test_all_whole_windows_are_taken() -> None:
    known = surveyed({"a": 10.0, "b": 2.0, "c": 4.9995})

    def plan(video: str, hop_s: float | None = None, **fields: Any) -> list[tuple[str, float]]:
        return keys({"video": video, **fields}, windows="all", hop_s=hop_s, surveyed=known)

    assert plan("a.mp4") == [("a#0", 0.0), ("a#2500", 2.5), ("a#5000", 5.0), ("a#7500", 7.5)]
    assert plan("a.mp4", 5.0) == [("a#0", 0.0), ("a#5000", 5.0)]
    assert plan("a.mp4", start_s=1.0, duration_s=5.2) == [("a#1000", 1.0), ("a#3500", 3.5)]
    assert plan("c.mp4") == [("c#0", 0.0), ("c#2500", 2.5)]
    # A file too short for one, or of unknown length, still gives one row or one reject.
    assert plan("b.mp4") == [("b", 0.0)]
    assert plan("unknown.mp4") == [("unknown", 0.0)]


def test_windows_of_scenes_begin_at_their_shots_and_cross_no_cut() -> None:
    known = surveyed(
        {"a": 13.0, "b": 9.0, "c": 6.0, "d": 4.9, "e": 20.0}, a=(3.0, 4.0, 9.0), b=(2.4, 4.8, 7.2), d=(2.5,)
    )

    def plan(video: str, **fields: Any) -> list[tuple[str, float]]:
        return keys({"video": video, **fields}, windows="scenes", surveyed=known)

    # A shot ends an eighth of a second before the cut is seen: 6.5 to 9.0 might hold the first picture of the next.
    assert plan("a.mp4") == [("a#0", 0.0), ("a#4000", 4.0), ("a#9000", 9.0)]
    assert plan("a.mp4", start_s=3.5, duration_s=5.4) == [("a", 4.0)]
    # The last shot lacks 2 and 4 % of a clip, which is padded; across an inner cut nothing is.
    assert plan("d.mp4") == [("d", 2.5)]
    assert plan("c.mp4") == [("c#0", 0.0), ("c#2500", 2.5)]
    assert plan("unknown.mp4") == [("unknown", 0.0)]
    table = plan_windows(entries_of({"video": "b.mp4"}), clip_s=2.5, windows="scenes", surveyed=known)
    row = plan_row(table, 0)
    assert (row["clip_id"], row["reason"], len(table)) == ("b", "too_short", 1)
    assert row["detail"] == "none of its 4 shots is as long as a clip, 2.5 s"


TIMES = st.floats(min_value=0, max_value=200, allow_nan=False).map(lambda t: round(t, 3))


@given(
    length_s=st.floats(min_value=0.1, max_value=200),
    cuts=st.lists(TIMES, max_size=12, unique=True),
    start_s=st.sampled_from([0.0, 0.5, 7.25]),
    duration_s=st.none() | st.floats(min_value=0.5, max_value=300),
    clip_s=st.sampled_from([1.0, 2.5, 8.0]),
    hop_s=st.none() | st.sampled_from([0.5, 3.0, 20.0]),
    windows=st.sampled_from(["all", "scenes"]),
)
@settings(max_examples=200, deadline=None)
def test_windows_lie_inside_their_part_and_their_shot_and_none_is_left_out(
    length_s: float,
    cuts: list[float],
    start_s: float,
    duration_s: float | None,
    clip_s: float,
    hop_s: float | None,
    windows: WindowChoice,
) -> None:
    known = {"/data/a.mp4": FileSurvey(length_s=length_s, cuts_s=tuple(sorted(cuts)))}
    row = {"video": "a.mp4", "start_s": start_s, "duration_s": duration_s}
    plan = plan_windows(entries_of(row), clip_s=clip_s, windows=windows, hop_s=hop_s, surveyed=known)
    found = [r["start_s"] for r in plan_rows(plan, 0, len(plan)) if r["reason"] is None]
    end_s = min(length_s, start_s + (math.inf if duration_s is None else duration_s))
    hop = hop_s or clip_s
    if windows == "all":
        expected = [start_s]
        while expected[-1] + hop + clip_s <= end_s + 0.001:
            expected.append(start_s + len(expected) * hop)
        part_is_long_enough = duration_s is None or duration_s >= 0.95 * clip_s
        assert sorted(found) == (expected if part_is_long_enough else [])
        return
    inner = [c for c in sorted(cuts) if start_s < c < end_s]
    assert all(start + clip_s <= end_s + max(0.001, 0.05 * clip_s) + 1e-9 for start in found)
    assert not [(s, c) for s in found for c in inner if s < c < s + clip_s + CUT_S - 0.0011]
    # Every shot that holds a whole clip gives one from its first picture.
    shots = zip([start_s, *inner], [*(c - CUT_S for c in inner), end_s], strict=True)
    if duration_s is None or duration_s >= 0.95 * clip_s:
        assert all(a in found for a, b in shots if b - a >= clip_s)
    # What gives no window gives one reject.
    assert found or plan["reason"].to_pylist() == ["too_short"]


def test_a_part_shorter_than_a_clip_is_rejected_unopened() -> None:
    for duration_s, reason in ((2.0, "too_short"), (2.4, None)):
        for windows in ("first", "all", "scenes"):
            plan = plan_windows(entries_of({"video": "a.mp4", "duration_s": duration_s}), clip_s=2.5, windows=windows)
            assert plan["reason"].to_pylist() == [reason]


def test_an_entry_with_a_problem_keeps_it_and_gives_one_row() -> None:
    row = {"video": "/etc/passwd", "problem": ("bad_uri", "an absolute path"), "duration_s": 0.1}
    plan = plan_windows(entries_of(row), clip_s=2.5, windows="all", surveyed=surveyed({"/etc/passwd": 60.0}))
    (planned,) = plan_rows(plan, 0, 1)
    assert (planned["reason"], planned["detail"]) == ("bad_uri", "an absolute path")


def test_a_plan_says_all_that_a_worker_needs_in_plain_values() -> None:
    event = {"time_s": 1.0, "duration_s": 0.2, "kind": "lamp", "variant": "cyan"}
    odd = os.fsdecode(b"x\xff.tar")
    member = {
        "video": f"{odd}!/m.mp4",
        "member": "m.mp4",
        "piece": Piece(f"/data/{odd}", 512, 99),
        "sound": Piece(f"/data/{odd}", 1024, 7),
        "events": '[{"time_s": 1.0, "duration_s": 0.2, "kind": "lamp", "variant": "cyan"}]',
    }
    plan = plan_windows(entries_of(member), clip_s=2.5)
    assert plan.schema == PLAN_SCHEMA
    row = plan_row(plan, 0)
    assert row["uri"] == row["sound_uri"] == f"/data/{odd}"
    assert (row["offset"], row["size_bytes"], row["sound_offset"], row["sound_size_bytes"]) == (512, 99, 1024, 7)
    assert row["source"] == "/data/x%FF.tar!/m.mp4"
    assert row["events"] == [event]
    assert row["clip_id"] == "m"


ENTRY = st.tuples(st.integers(0, 40), st.sampled_from(["train", "val", "test"]), st.sampled_from([0.0, 1.0, 2.5]))


@given(st.lists(ENTRY, min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_plan_is_sorted_holds_every_entry_once_and_does_not_depend_on_their_order(
    rows: list[tuple[int, str, float]],
) -> None:
    def plan(order: list[tuple[int, str, float]]) -> pa.Table:
        described = [{"video": f"é{n}.mp4", "split": split, "start_s": start} for n, split, start in order]
        return plan_windows(entries_of(*described), clip_s=2.5)

    # Of repeats the first counts, so that order would matter for what is left of them.
    rows = list({(n, start): (n, split, start) for n, split, start in rows}.values())
    table = plan(rows)
    assert table.equals(plan(rows[::-1]))
    order = list(zip(table["split"].to_pylist(), table["clip_id"].to_pylist(), strict=True))
    assert order == sorted(order)
    counts = {n: sum(n == m for m, _, _ in rows) for n, _, _ in rows}
    expected = {clip_key(f"é{n}.mp4") + (f"#{round(s * 1000)}" if counts[n] > 1 else "") for n, _, s in rows}
    assert {key for _, key in order} == expected
    assert len(order) == len(rows)


def test_files_to_survey_are_each_named_once() -> None:
    rows = [
        {"video": "b.mp4"},
        {"video": "b.mp4", "start_s": 3.0},
        {"video": "bad.mp4", "problem": ("missing", "")},
        {"video": "a.tar!/1.mp4", "member": "1.mp4", "piece": Piece("/data/a.tar", 512, 8)},
        {"video": "a.tar!/2.mp4", "member": "2.mp4", "piece": Piece("/data/a.tar", 1024, 9)},
    ]
    files = files_to_survey(entries_of(*rows))
    assert files.schema == SURVEY_SCHEMA
    assert files.to_pylist() == [
        {"source": "/data/a.tar!/1.mp4", "uri": b"/data/a.tar", "offset": 512, "size_bytes": 8},
        {"source": "/data/a.tar!/2.mp4", "uri": b"/data/a.tar", "offset": 1024, "size_bytes": 9},
        {"source": "/data/b.mp4", "uri": b"/data/b.mp4", "offset": None, "size_bytes": None},
    ]
    twins = [{"video": "e\u0301/1.mp4"}, {"video": "é/1.mp4"}]
    with pytest.raises(InputError, match=r"two files are called '/data/é/1\.mp4'"):
        files_to_survey(entries_of(*twins))
