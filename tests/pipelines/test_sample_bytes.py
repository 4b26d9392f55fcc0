"""Bytes of a training sample: at most half of MMAudio's store on the least compressible rows, and measured right."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from models.spec import SPECS, ClipSpec
from pipelines.data.commits import commit_unit, dataset_manifest
from pipelines.data.contracts import FEATURES, REJECTS
from pipelines.data.sample_bytes import sample_bytes
from pipelines.data.store import Dataset
from pipelines.data.tables import column_to_numpy, table_from_rows
from pipelines.data.units import cut_units
from pipelines.errors import ContractError, InputError
from pipelines.stage import StageContext, run_stage
from pipelines.training.flow_matching_objective import TENSORS
from tests.pipelines.row_factory import TINY, make_row

COLUMNS = TENSORS
MMAUDIO_BYTES = {"16k": 1.207e6, "44k": 1.278e6}


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def white_rows(spec: ClipSpec, count: int) -> list[dict]:
    """Rows as CLIP, Synchformer and the VAE scale them, but white: neighbours in time or channel tell nothing."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        row = make_row(FEATURES, f"clip_{index:03d}", seed=index, spec=spec)
        row["clip_features"] = _unit(rng.standard_normal((spec.clip_len, spec.clip_dim))).astype(np.float16)
        row["text_features"] = _unit(rng.standard_normal((spec.text_len, spec.text_dim))).astype(np.float16)
        row["sync_features"] = rng.standard_normal((spec.sync_len, spec.sync_dim)).astype(np.float16)
        row["latent_mean"] = rng.standard_normal((spec.latent_len, spec.latent_dim)).astype(np.float32)
        row["latent_std"] = np.exp(rng.normal(-2, 0.5, (spec.latent_len, spec.latent_dim))).astype(np.float32)
        rows.append(row)
    return rows


def write(out: Path, rows: list[dict], spec: ClipSpec, unit_size: int = 64) -> Dataset:
    def body(context: StageContext) -> None:
        for unit in cut_units(rows, size=unit_size):
            table = table_from_rows(unit.rows, FEATURES, spec)
            commit_unit(context.folder, unit, table, REJECTS.schema(spec).empty_table(), FEATURES, spec)
        context.finish(dataset_manifest(context.folder, FEATURES, spec))

    run_stage(name="features", config={}, inputs={}, out=str(out), body=body, say=lambda line: None)
    return Dataset.open(str(out), FEATURES)


@pytest.mark.parametrize("name", ["16k", "44k"])
def test_a_sample_reads_at_most_half_of_what_mmaudio_reads_even_of_white_noise(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    rows = white_rows(spec, 8)
    dataset = write(tmp_path / "features", rows, spec)
    measured = sample_bytes(dataset, COLUMNS, "train")
    assert measured.float32 == pytest.approx(MMAUDIO_BYTES[name], rel=1e-3)
    assert measured.total <= MMAUDIO_BYTES[name] / 2, measured.line

    file = tmp_path / "features" / dataset.parts[0].path
    plain = pq.read_table(file, columns=list(COLUMNS))
    query = f"select {', '.join(COLUMNS)} from '{file}' where clip_id = 'clip_005'"
    from_duckdb = duckdb.sql(query).fetchnumpy()
    for column in COLUMNS:
        expected = rows[5][column]
        assert np.array_equal(column_to_numpy(plain[column])[5], expected), column
        read = np.asarray(from_duckdb[column][0], expected.dtype)
        assert np.array_equal(read.reshape(expected.shape), expected), column


def test_the_bytes_are_those_of_the_projected_columns_alone(tmp_path: Path) -> None:
    rows = [make_row(FEATURES, f"c{i:03d}", seed=i, split="train" if i < 6 else "val") for i in range(9)]
    dataset = write(tmp_path / "few", rows, TINY)
    fat = [row | {"audio": np.random.default_rng(0).bytes(100_000)} for row in rows]
    with_audio = write(tmp_path / "fat", fat, TINY)
    assert with_audio.parts[0].bytes > dataset.parts[0].bytes + 90_000
    measured, again = sample_bytes(dataset, COLUMNS), sample_bytes(with_audio, COLUMNS)
    assert measured == again
    assert sum(p.bytes for p in dataset.parts) / 9 > measured.total > 0.7 * measured.float32 / 2
    one, two = (
        sample_bytes(dataset, ["latent_mean"], "val"),
        sample_bytes(dataset, ["latent_mean", "latent_std"], "val"),
    )
    assert two.columns["latent_mean"] == one.total
    assert two.float32 == 2 * one.float32 == 2 * 40 * 160 * 4


def test_many_parts_are_sampled_evenly_and_give_the_same_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write(tmp_path / "many", [make_row(FEATURES, f"c{i:03d}", seed=i) for i in range(12)], TINY, unit_size=1)
    exact = sample_bytes(dataset, COLUMNS, "train")
    monkeypatch.setattr("pipelines.data.sample_bytes.MAX_FOOTERS", 5)
    read: list[str] = []
    join = type(dataset.folder).join
    monkeypatch.setattr(type(dataset.folder), "join", lambda self, name: read.append(name) or join(self, name))
    sampled = sample_bytes(dataset, COLUMNS, "train")
    assert read == [dataset.parts[index].path for index in (0, 2, 4, 7, 9)]
    assert sampled.total == pytest.approx(exact.total, rel=0.01)


def test_the_line_says_columns_total_and_share(tmp_path: Path) -> None:
    measured = sample_bytes(write(tmp_path / "f", [make_row(FEATURES, "a")], TINY), ["latent_mean", "latent_std"])
    assert measured.line.startswith(f"a training sample reads {measured.total / 1e6:.3f} MB (latent_mean 0.02")
    assert f"it, 0.051 MB: {measured.total / 51_200:.2f} of it" in measured.line


def test_an_empty_split_and_a_column_without_tensors_are_refused(tmp_path: Path) -> None:
    dataset = write(tmp_path / "f", [make_row(FEATURES, "a")], TINY)
    with pytest.raises(InputError, match=r"has no clips of split 'val'; it has \{'train': 1\}"):
        sample_bytes(dataset, COLUMNS, "val")
    with pytest.raises(ContractError, match="column 'audio' of features is binary and no tensor"):
        sample_bytes(dataset, ["audio"])
    with pytest.raises(ContractError, match="has no column 'mel'"):
        sample_bytes(dataset, ["mel"])
