import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.commits import commit_unit, dataset_manifest
from pipelines.data.contracts import FEATURES, PAIRS, REJECTS
from pipelines.data.storage import open_folder
from pipelines.data.store import Dataset, encode_part, files_manifest, open_files
from pipelines.data.tables import table_from_rows
from pipelines.data.units import Unit, cut_units
from pipelines.errors import ContractError, InputError
from pipelines.stage import StageContext, run_stage
from tests.pipelines.row_factory import TINY, make_row


def write_features(out: Path, rows: list[dict], unit_size: int = 64) -> Dataset:
    """A finished features dataset of `rows`."""

    def body(context: StageContext) -> None:
        for unit in cut_units(rows, size=unit_size):
            table = table_from_rows(unit.rows, FEATURES, TINY)
            rejects = REJECTS.schema(TINY).empty_table()
            commit_unit(context.folder, unit, table, rejects, FEATURES, TINY)
        context.finish(dataset_manifest(context.folder, FEATURES, TINY))

    run_stage(name="features", config={}, inputs={}, out=str(out), body=body, say=lambda line: None)
    return Dataset.open(str(out), FEATURES)


def rows_of(count: int, split: str = "train") -> list[dict]:
    return [make_row(FEATURES, f"{split}_{i:03d}", seed=i, split=split) for i in range(count)]


def test_tensors_are_readable_by_plain_pyarrow_and_by_duckdb(tmp_path: Path) -> None:
    rows = rows_of(3)
    dataset = write_features(tmp_path / "f", rows)
    file = tmp_path / "f" / dataset.parts[0].path
    plain = pq.read_table(file)
    assert np.array_equal(
        plain["clip_features"].combine_chunks().to_numpy_ndarray(), np.stack([r["clip_features"] for r in rows])
    )
    query = f"select clip_id, latent_mean, sync_features, caption from '{file}' where clip_id = 'train_001'"
    clip_id, latent, sync, caption = duckdb.sql(query).fetchall()[0]
    assert clip_id == "train_001"
    assert caption == rows[1]["caption"]
    assert np.array_equal(np.float32(latent).reshape(40, 160), rows[1]["latent_mean"])
    assert np.array_equal(np.float16(sync).reshape(40, 576), rows[1]["sync_features"])


def test_row_groups_hold_64_rows_and_parts_one_split(tmp_path: Path) -> None:
    dataset = write_features(tmp_path / "f", rows_of(70) + rows_of(5, "val"), unit_size=128)
    assert sorted((p.split, p.row_groups) for p in dataset.parts) == [("train", (64, 6)), ("val", (5,))]
    assert dataset.splits == {"train": 70, "val": 5}
    assert [g.num_rows for g in dataset.iter_row_groups(["clip_id"], "train")] == [64, 6]
    assert dataset.read(["split"], split="val")["split"].to_pylist() == ["val"] * 5
    assert dataset.read(["clip_id"], clip_ids=["val_003", "train_010"])["clip_id"].to_pylist() == [
        "train_010",
        "val_003",
    ]


def test_the_digest_sees_values_and_not_grouping_order_or_places(tmp_path: Path) -> None:
    rows = rows_of(9)
    digest = write_features(tmp_path / "a", rows, unit_size=4).digest
    moved = [row | {"source": f"/elsewhere/{row['clip_id']}"} for row in reversed(rows)]
    assert write_features(tmp_path / "b", moved, unit_size=2).digest == digest
    changed = [dict(row) for row in rows]
    changed[5]["latent_mean"] = np.nextafter(changed[5]["latent_mean"], np.float32(9))
    assert write_features(tmp_path / "c", changed, unit_size=4).digest != digest
    assert write_features(tmp_path / "d", rows[:-1], unit_size=4).digest != digest


def test_a_reader_trusts_the_manifest_alone(tmp_path: Path) -> None:
    dataset = write_features(tmp_path / "f", rows_of(4))
    foreign = encode_part(table_from_rows(rows_of(2, "val"), FEATURES, TINY), FEATURES, TINY)
    (tmp_path / "f/data/part-foreign.parquet").write_bytes(foreign)
    (tmp_path / "f/data/part-half.parquet").write_bytes(foreign[:100])
    assert Dataset.open(str(tmp_path / "f"), FEATURES).num_rows() == 4
    part = tmp_path / "f" / dataset.parts[0].path
    part.write_bytes(part.read_bytes()[:-7])
    with pytest.raises(ContractError, match="the manifest says"):
        Dataset.open(str(tmp_path / "f"), FEATURES)
    part.unlink()
    with pytest.raises(ContractError, match="is missing"):
        Dataset.open(str(tmp_path / "f"), FEATURES)


def test_unfinished_foreign_and_newer_datasets_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist or is empty"):
        Dataset.open(str(tmp_path / "nothing"), FEATURES)
    write_features(tmp_path / "f", rows_of(2))
    with pytest.raises(ContractError, match="holds features/3, this code reads pairs/1"):
        Dataset.open(str(tmp_path / "f"), PAIRS)
    manifest = tmp_path / "f/manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"version": 4}))
    with pytest.raises(ContractError, match="holds features/4, this code reads features/3"):
        Dataset.open(str(tmp_path / "f"), FEATURES)
    manifest.unlink()
    with pytest.raises(InputError, match="is not finished"):
        Dataset.open(str(tmp_path / "f"), FEATURES)


def test_a_clip_in_two_parts_is_refused_when_the_manifest_is_written(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "x")
    table = table_from_rows(rows_of(2), FEATURES, TINY)
    for name in ("a", "b"):
        unit = Unit(unit_id=name, split="train", rows=(0, 1))
        commit_unit(folder, unit, table, REJECTS.schema(TINY).empty_table(), FEATURES, TINY)
    with pytest.raises(ContractError, match=r"clip 'train_000' is in data/part-a.parquet and in data/part-b.parquet"):
        dataset_manifest(folder, FEATURES, TINY)


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    for name in ("../secret", "/etc/passwd", "a/../../b", "a//b"):
        with pytest.raises(InputError, match="plain relative name"):
            folder.read_bytes(name)


def test_altered_files_of_a_checkpoint_are_named(tmp_path: Path) -> None:
    def body(context: StageContext) -> None:
        context.folder.write_bytes("network.safetensors", b"weights")
        context.finish({"kind": "policy", "files": files_manifest(context.folder, ["network.safetensors"])})

    run_stage(name="train", config={}, inputs={}, out=str(tmp_path / "m"), body=body, say=lambda line: None)
    open_files(str(tmp_path / "m"), "policy")
    with pytest.raises(InputError, match="holds a policy, expected a sf_cavp"):
        open_files(str(tmp_path / "m"), "sf_cavp")
    (tmp_path / "m/network.safetensors").write_bytes(b"Weights")
    with pytest.raises(ContractError, match=r"network\.safetensors does not have the manifest's sha256"):
        open_files(str(tmp_path / "m"), "policy")


def test_a_conditional_write_keeps_the_first_content(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.write_bytes("manifest.json", b"first", only_if_absent=True)
    with pytest.raises(FileExistsError):
        folder.write_bytes("manifest.json", b"second", only_if_absent=True)
    assert folder.read_bytes("manifest.json") == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_rejects_are_read_sorted(tmp_path: Path) -> None:
    rejects = table_from_rows([make_row(REJECTS, "b"), make_row(REJECTS, "a")], REJECTS, TINY)

    def body(context: StageContext) -> None:
        unit = Unit(unit_id="x", split="train", rows=(0, 1))
        commit_unit(context.folder, unit, FEATURES.schema(TINY).empty_table(), rejects, FEATURES, TINY)
        context.finish(dataset_manifest(context.folder, FEATURES, TINY))

    run_stage(name="features", config={}, inputs={}, out=str(tmp_path / "f"), body=body, say=lambda line: None)
    dataset = Dataset.open(str(tmp_path / "f"), FEATURES)
    assert dataset.read_rejects()["clip_id"].to_pylist() == ["a", "b"]
    assert dataset.manifest["counts"] == {"in": 2, "out": 0, "rejected": 2}
    assert isinstance(dataset.read(), pa.Table)
