"""The journal of a resumed run has every step once."""

import math
from pathlib import Path

from pipelines.training.journal import Journal, read_journal


def test_a_resumed_journal_loses_no_step_and_doubles_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, 0)
    for step in (1, 2, 3, 4, 5):
        journal.append(step, {"loss": float(step)})
    journal.close()
    resumed = Journal(path, 3)
    for step in (4, 5, 6):
        resumed.append(step, {"loss": 10.0 * step})
    resumed.close()
    assert [(r["step"], r["loss"]) for r in read_journal(path)] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    journal = Journal(path, 1)
    journal.append(2, {"loss": 2.0})
    journal.close()
    assert [r["step"] for r in read_journal(path)] == [1, 2]


def test_a_value_that_is_not_finite_is_null_and_not_broken_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", 0)
    journal.append(1, {"loss": math.nan, "norm": math.inf, "skipped": 1.0})
    journal.close()
    assert read_journal(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "norm": None, "skipped": 1.0}]
