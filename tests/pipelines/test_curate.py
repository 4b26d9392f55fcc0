"""Curation keeps rows bit for bit, counts what it drops and why, survives a kill, and refuses what does not belong."""

import json
from pathlib import Path

import pytest

from pipelines.curation.curate import curate, plan_curation
from pipelines.curation.measure import measure
from pipelines.curation.report import ReportSettings
from pipelines.data.clip_units import row_group_units
from pipelines.data.commits import done_units
from pipelines.data.contracts import FEATURES
from pipelines.data.digest import row_hashes
from pipelines.data.storage import open_folder
from pipelines.data.store import Dataset
from pipelines.data.units import HERE
from pipelines.errors import InputError, Refused, StageConflict
from pipelines.stage import untracked
from tests.feature_factory import write_features
from tests.pipelines.deaths import dies_after

SPLITS = {"train": 130, "rpo": 9, "val": 7, "test": 5}
KEEP = ("loudness_lufs >= -12", "abs(dc_offset) <= 12 or null", "num_cuts != 3")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features with random measures (some null), of three row groups and more, and their measures."""
    folder = tmp_path_factory.mktemp("curated")
    write_features(folder / "features", SPLITS)
    measure_them(folder / "features", folder / "measures")
    run(folder, KEEP, folder / "kept")
    return folder


def measure_them(features: Path, out: Path) -> None:
    # The frames of these features are no pictures: examples cannot be shown, and the page says so.
    measure(
        str(features),
        None,
        out=str(out),
        pool=HERE,
        report=ReportSettings(num_examples=1),
        track=untracked,
        say=lambda line: None,
    )


def run(world: Path, keep: tuple[str, ...], out: Path) -> Dataset:
    plan = plan_curation(str(world / "features"), str(world / "measures"), keep)
    curate(plan, out=str(out), pool=HERE, track=untracked, say=lambda line: None)
    return Dataset.open(str(out), FEATURES)


def meets_all(measures: dict) -> bool:
    loudness = measures["loudness_lufs"]
    return loudness is not None and loudness >= -12 and abs(measures["dc_offset"]) <= 12 and measures["num_cuts"] != 3


def hashes(dataset: Dataset) -> dict[str, str]:
    return {
        key: value
        for part in dataset.parts
        for index in range(len(part.row_groups))
        for key, value in row_hashes(dataset.read_row_group(part, index), FEATURES)
    }


def test_the_kept_rows_are_the_rows_that_were_there_and_the_rest_are_rejects(world: Path) -> None:
    before, after = Dataset.open(str(world / "features"), FEATURES), Dataset.open(str(world / "kept"), FEATURES)
    measures = {row["clip_id"]: row["measures"] for row in before.read(["clip_id", "measures"]).to_pylist()}
    wanted = {clip_id for clip_id, measured in measures.items() if meets_all(measured)}
    assert 10 < len(wanted) < len(measures) - 10
    was, now = hashes(before), hashes(after)
    assert now == {clip_id: was[clip_id] for clip_id in wanted}
    assert {row["clip_id"]: row["split"] for row in after.read(["clip_id", "split"]).to_pylist()} == {
        clip_id: clip_id.split("_")[0] for clip_id in wanted
    }
    rejects = after.read_rejects().to_pylist()
    assert {row["clip_id"] for row in rejects} == set(measures) - wanted
    assert {(row["stage"], row["reason"]) for row in rejects} == {("curate", "filtered")}
    assert after.manifest["counts"] == {"in": len(measures), "out": len(wanted), "rejected": len(rejects)}


def test_a_reject_names_the_first_predicate_it_did_not_meet_and_its_value(world: Path) -> None:
    after = Dataset.open(str(world / "kept"), FEATURES)
    measured = Dataset.open(str(world / "features"), FEATURES).read(["clip_id", "measures"]).to_pylist()
    values = {row["clip_id"]: row["measures"] for row in measured}
    for row in after.read_rejects().to_pylist():
        own = values[row["clip_id"]]
        if own["loudness_lufs"] is None:
            assert row["detail"] == "loudness_lufs >= -12: it is not known"
        elif own["loudness_lufs"] < -12:
            assert row["detail"] == f"loudness_lufs >= -12: it is {own['loudness_lufs']:.6g}"
        else:
            assert row["detail"].startswith(("abs(dc_offset) <= 12 or null: it is ", "num_cuts != 3: it is 3"))


def test_the_manifest_records_predicates_their_effects_and_both_fingerprints(world: Path) -> None:
    manifest = Dataset.open(str(world / "kept"), FEATURES).manifest
    assert manifest["config"]["keep"] == list(KEEP)
    for role in ("features", "measures"):
        assert manifest["inputs"][role] == json.loads((world / role / "manifest.json").read_text())["fingerprint"]
    assert [e["text"] for e in manifest["predicates"]] == list(KEEP)
    assert sum(e["in_sequence"] for e in manifest["predicates"]) == manifest["counts"]["rejected"]
    assert manifest["predicates"][-1]["left"] == manifest["counts"]["out"]


def test_predicates_that_all_meet_give_the_same_digest_and_other_thresholds_another_folder(
    world: Path, tmp_path: Path
) -> None:
    everything = run(world, ("valid_s > 0",), tmp_path / "all")
    assert everything.digest == Dataset.open(str(world / "features"), FEATURES).digest
    assert everything.manifest["counts"]["rejected"] == 0
    with pytest.raises(StageConflict, match="keep: "):
        run(world, ("valid_s > 1",), tmp_path / "all")


def test_a_curation_that_was_killed_goes_on_and_equals_one_that_was_not(world: Path, tmp_path: Path) -> None:
    dies_after(3, lambda: run(world, KEEP, tmp_path / "c"))
    features = Dataset.open(str(world / "features"), FEATURES)
    assert len(done_units(open_folder(str(tmp_path / "c")))) == 3 < len(row_group_units(features))
    resumed, quiet = run(world, KEEP, tmp_path / "c"), Dataset.open(str(world / "kept"), FEATURES)
    assert resumed.digest == quiet.digest
    assert resumed.manifest["counts"] == quiet.manifest["counts"]


def test_measures_of_other_features_are_refused(world: Path, tmp_path: Path) -> None:
    write_features(tmp_path / "other", {"train": 3}, seed=5)
    with pytest.raises(InputError, match="was measured on other features"):
        plan_curation(str(tmp_path / "other"), str(world / "measures"), KEEP)


def test_predicates_that_nothing_meets_are_told_as_a_refusal_with_the_dataset_there(
    world: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="none of 151 clips meets every --keep"):
        run(world, ("peak > 1e9",), tmp_path / "none")
    assert Dataset.open(str(tmp_path / "none"), FEATURES).manifest["counts"]["rejected"] == 151
    # Curated again, as any features dataset can be: nothing is left to measure.
    with pytest.raises(InputError, match="no rows to measure"):
        measure_them(tmp_path / "none", tmp_path / "m")


def test_what_was_curated_can_be_measured_and_curated_again(world: Path, tmp_path: Path) -> None:
    measure_them(world / "kept", tmp_path / "m")
    plan = plan_curation(str(world / "kept"), str(tmp_path / "m"), ("num_cuts == 0",))
    curate(plan, out=str(tmp_path / "twice"), pool=HERE, track=untracked, say=lambda line: None)
    twice = Dataset.open(str(tmp_path / "twice"), FEATURES)
    assert {row["measures"]["num_cuts"] for row in twice.read(["measures"]).to_pylist()} == {0}
