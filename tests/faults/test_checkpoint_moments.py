"""A checkpoint of two ranks is hit at its worst moments, and a rollback of two; the result is that of a quiet run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.adjustments import read_adjustments
from pipelines.training.journal import read_journal
from tests.faults.checkpoint_moments_run import KILLS, OPTIONS
from tests.feature_factory import write_features
from tests.pipelines.test_guards import two_clips_that_meet_in_another_way
from tests.training_runs import losses_of

pytestmark = pytest.mark.slow

LIMIT_S = 400.0


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all these trainings, and what their ranks said."""
    folder = tmp_path_factory.mktemp("moments")
    features = str(write_features(folder / "features", {"train": 40, "val": 24}))
    poison = two_clips_that_meet_in_another_way(features)
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.checkpoint_moments_run", str(folder), features, *poison],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((folder / "found.json").read_text())
    assert found["quiet"] == ["done", "done"]
    return folder, found


def _assert_as_quiet(folder: Path, name: str) -> None:
    assert losses_of(folder / name) == losses_of(folder / "quiet")
    assert (folder / name / "toy.safetensors").read_bytes() == (folder / "quiet" / "toy.safetensors").read_bytes()


@pytest.mark.parametrize("moment", KILLS)
def test_a_rank_killed_while_a_checkpoint_is_written_costs_nothing_but_steps(
    ran: tuple[Path, dict[str, Any]], moment: str
) -> None:
    folder, found = ran
    assert found[moment]["told"][KILLS[moment]] == "killed"
    # The checkpoint of step 6 was hit before it counted, or when it did already.
    assert found[moment]["step"] == (6 if moment == "while_old_ones_go" else 3)
    assert [said.split(";")[0] for said in found[moment]["then"]] == ["done", "done"]
    _assert_as_quiet(folder, moment)


def test_one_rank_that_cannot_write_stops_both_by_name_and_the_checkpoint_before_is_taken(
    ran: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = ran
    for said in found["no_space"]["told"]:
        assert said.startswith("exit 3: ")
        assert "the checkpoint of step 6 cannot be written (rank 1: " in said
        assert "No space left on device" in said
        assert said.count("run the same command again") == 1
    assert found["no_space"]["step"] == 3
    assert found["no_space"]["then"][0].startswith("done; checkpoint step_00000006-1 passed over: no COMPLETE file")
    _assert_as_quiet(folder, "no_space")


def test_two_ranks_roll_back_to_the_same_checkpoint_and_go_on_in_the_same_other_order(
    ran: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = ran
    note = "rolled back from step 10 to 6, order 1 of the samples from there"
    assert found["rollback"][0].startswith(f"done; {note}")
    assert found["rollback"][1] == "done"
    both, alone = (read_adjustments(folder / name / "checkpoints") for name in ("rollback", "rollback_alone"))
    assert both == alone
    records = read_journal(folder / "rollback" / "metrics.jsonl")
    assert [record.get("order") for record in records] == [None] * 6 + [1.0] * 6
    assert len(records) == OPTIONS.steps
    # One rank has both halves of every batch: only two ranks in the same order have the same losses.
    # A step that was skipped has none.
    losses, expected = (losses_of(folder / name) for name in ("rollback", "rollback_alone"))
    assert [loss is None for loss in losses] == [loss is None for loss in expected]
    assert [loss or 0.0 for loss in losses] == pytest.approx([loss or 0.0 for loss in expected], rel=5e-6)
