import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.commits import dataset_manifest, done_units
from pipelines.data.contracts import FEATURES, REJECTS
from pipelines.data.storage import open_folder
from pipelines.data.tables import table_from_rows
from pipelines.data.unit_pool import actor_cpus
from pipelines.data.units import HERE, Alive, ListedUnits, Pool, Unit, cut_units, run_units
from pipelines.errors import EnvironmentFailed, InputError
from tests.pipelines.row_factory import TINY, make_row


class Maker:
    """Makes a row of each clip, rejects ids ending in 7; may die once, or raise."""

    def __init__(self, marker: str = "", raises: bool = False) -> None:
        self.marker = marker
        self.raises = raises

    def process(self, unit: Unit, alive: Alive) -> tuple[pa.Table, pa.Table]:
        if self.raises:
            raise InputError("the policy at /m0 is of another size; give the matching preset")
        if self.marker and unit.unit_id.startswith("train-000001") and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rows, rejects = [], []
        for row in unit.rows:
            bad = row["clip_id"].endswith("7")
            target, contract = (rejects, REJECTS) if bad else (rows, FEATURES)
            target.append(make_row(contract, row["clip_id"], split=row["split"]))
            alive()
        return table_from_rows(rows, FEATURES, TINY), table_from_rows(rejects, REJECTS, TINY)

    def close(self) -> None:
        """Nothing to end."""


def clips(count: int, split: str = "train") -> list[dict]:
    return [{"clip_id": f"{split}_{i:03d}", "split": split} for i in range(count)]


def _made(factory: Callable[[], Maker], device: torch.device) -> Maker:
    assert device == torch.device("cpu")
    return factory()


def run(out: Path, units: list[Unit], pool: Pool, factory: Callable[[], Maker] = Maker) -> dict:
    make = partial(_made, factory)
    run_units(ListedUnits(tuple(units)), pool, factory=make, contract=FEATURES, spec=TINY, out=str(out))
    return dataset_manifest(open_folder(out), FEATURES, TINY)


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=4), st.sampled_from(["train", "val"])), unique_by=lambda r: r[0])
)
@settings(max_examples=50, deadline=None)
def test_units_hold_every_row_once_and_do_not_depend_on_order(rows: list[tuple[str, str]]) -> None:
    table = [{"clip_id": clip, "split": split} for clip, split in rows]
    units = cut_units(table, size=3)
    assert units == cut_units(list(reversed(table)), size=3)
    assert sorted(r["clip_id"] for u in units for r in u.rows) == sorted(clip for clip, _ in rows)
    assert all(len(u.rows) <= 3 and {r["split"] for r in u.rows} == {u.split} for u in units)
    assert len({u.unit_id for u in units}) == len(units)


def test_counts_add_up_and_an_interrupted_run_does_only_the_rest(tmp_path: Path) -> None:
    units = cut_units(clips(20) + clips(9, "val"), size=4)
    whole = run(tmp_path / "whole", units, HERE)
    assert whole["counts"] == {"in": 29, "out": 26, "rejected": 3}
    first = run(tmp_path / "parts", units[:3], HERE)
    assert first["counts"]["in"] == 12
    kept = {
        n: (tmp_path / f"parts/data/part-{n}.parquet").stat().st_ino
        for n in done_units(open_folder(tmp_path / "parts"))
    }
    assert run(tmp_path / "parts", units, HERE)["digest"] == whole["digest"]
    assert all((tmp_path / f"parts/data/part-{n}.parquet").stat().st_ino == inode for n, inode in kept.items())


@pytest.mark.ray
def test_a_killed_actor_costs_nothing_and_one_or_two_workers_give_the_same_digest(
    tmp_path: Path, ray_cluster: None
) -> None:
    units = cut_units(clips(16), size=4)
    digest = run(tmp_path / "here", units, HERE)["digest"]
    killed = run(tmp_path / "killed", units, Pool(num_workers=2), partial(Maker, marker=str(tmp_path / "died")))
    assert (tmp_path / "died").exists()
    assert killed["digest"] == digest
    assert killed["counts"] == {"in": 16, "out": 15, "rejected": 1}


@pytest.mark.ray
def test_what_a_worker_raises_arrives_as_itself(tmp_path: Path, ray_cluster: None) -> None:
    with pytest.raises(InputError, match="another size"):
        run(tmp_path / "x", cut_units(clips(2)), Pool(num_workers=1), partial(Maker, raises=True))


@pytest.mark.parametrize(("cpus", "workers"), [(1, 1), (2, 1), (2, 2), (2, 4), (8, 8), (64, 4)])
def test_a_pool_never_takes_every_cpu(cpus: float, workers: int) -> None:
    assert 0 < actor_cpus(cpus, workers) * workers < cpus


class Hanging(Maker):
    """Stops itself, as a debugger or a lost driver call would, at its first unit."""

    def process(self, unit: Unit, alive: Alive) -> tuple[pa.Table, pa.Table]:
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return Maker().process(unit, alive)


class Deadly(Maker):
    """Dies of every unit."""

    def process(self, unit: Unit, alive: Alive) -> tuple[pa.Table, pa.Table]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("unreachable")


@pytest.mark.ray
def test_fault_21_a_stopped_worker_is_killed_and_its_unit_done_by_another(tmp_path: Path, ray_cluster: None) -> None:
    units = cut_units(clips(8), size=4)
    whole = run(tmp_path / "here", units, HERE)
    pool = Pool(num_workers=1, stall_s=2.0)
    found = run(tmp_path / "hung", units, pool, partial(Hanging, marker=str(tmp_path / "stopped")))
    assert (tmp_path / "stopped").exists()
    assert found == whole


@pytest.mark.ray
@pytest.mark.slow
def test_rows_that_kill_every_worker_end_in_a_message(tmp_path: Path, ray_cluster: None) -> None:
    with pytest.raises(EnvironmentFailed, match=r"begun 6 times and its worker died"):
        run(tmp_path / "dead", cut_units(clips(4)), Pool(num_workers=1), Deadly)
