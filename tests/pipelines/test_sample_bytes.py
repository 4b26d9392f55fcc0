"""What a training sample costs to read, by the contract's own writer on the worst data there can be."""

from pathlib import Path

import duckdb
import numpy as np
import pytest

from models.spec import SPECS, ClipSpec
from pipelines.data.contracts import FEATURES
from pipelines.data.sample_bytes import MMAUDIO_BYTES, sample_bytes, sample_bytes_line
from pipelines.data.storage import open_folder
from pipelines.data.store import Dataset, dataset_manifest, encode_part
from pipelines.data.tables import table_from_rows
from pipelines.stage import StageContext, run_stage, untracked
from pipelines.training.flow_matching_objective import FlowMatchingObjective
from tests.feature_factory import feature_row

COLUMNS = FlowMatchingObjective.columns


def white(rng: np.random.Generator, *shape: int, unit: bool = False) -> np.ndarray:
    """Gaussian noise without any structure, in unit vectors as embeddings are."""
    values = rng.standard_normal(shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True) if unit else values


def worst_row(rng: np.random.Generator, index: int, spec: ClipSpec) -> dict[str, object]:
    latents = (spec.latent_len, spec.latent_dim)
    return {
        **feature_row(np.random.default_rng(0), f"clip_{index:03d}", "train", SPECS["tiny"]),
        "duration_s": spec.duration_s,
        "clip_features": white(rng, spec.clip_len, spec.clip_dim, unit=True).astype(np.float16),
        "sync_features": white(rng, spec.sync_len, spec.sync_dim).astype(np.float16),
        "text_features": white(rng, spec.text_len, spec.text_dim, unit=True).astype(np.float16),
        "latent_mean": white(rng, *latents).astype(np.float32),
        "latent_std": np.exp(0.5 * white(rng, *latents) - 2).astype(np.float32),
    }


def write(out: Path, spec: ClipSpec, num_rows: int) -> Dataset:
    rng = np.random.default_rng(0)
    table = table_from_rows([worst_row(rng, index, spec) for index in range(num_rows)], FEATURES, spec)

    def body(context: StageContext) -> None:
        context.folder.write_bytes("data/part-0.parquet", encode_part(table, FEATURES, spec))
        context.finish(dataset_manifest(open_folder(str(out)), FEATURES, spec))

    run_stage(name="x", config={}, inputs={}, out=str(out), body=body, track=untracked, say=lambda line: None)
    return Dataset.open(str(out), FEATURES)


@pytest.mark.parametrize("name", ["16k", "44k"])
def test_a_sample_reads_at_most_half_of_what_the_originals_store_reads(tmp_path: Path, name: str) -> None:
    dataset = write(tmp_path, SPECS[name], 16)
    found = sample_bytes(dataset, COLUMNS, "train")
    assert set(found) == set(COLUMNS)
    assert sum(found.values()) <= 0.5 * MMAUDIO_BYTES[name]
    # Noise of 16 bits cannot shrink to 12: a smaller figure would be a wrong count.
    assert found["clip_features"] > 0.75 * 64 * 1024 * 2
    line = sample_bytes_line(found, name)
    assert f"MMAudio's float32 store reads {MMAUDIO_BYTES[name] / 1e3:.0f} kB: 0.4" in line


def test_only_projected_columns_are_counted_and_add_up_to_the_file(tmp_path: Path) -> None:
    dataset = write(tmp_path, SPECS["tiny"], 8)
    every = sample_bytes(dataset, [column.name for column in FEATURES.columns])
    size = (tmp_path / "data" / "part-0.parquet").stat().st_size / 8
    assert 0.7 * size < sum(every.values()) < size
    some = sample_bytes(dataset, ("latent_mean",))
    assert some == {"latent_mean": every["latent_mean"]}
    assert "MMAudio" not in sample_bytes_line(some, "tiny")
    with pytest.raises(ValueError, match="no rows of split 'val'"):
        sample_bytes(dataset, COLUMNS, "val")


def test_plain_readers_read_the_half_precision_columns(tmp_path: Path) -> None:
    dataset = write(tmp_path, SPECS["16k"], 2)
    path = tmp_path / "data" / "part-0.parquet"
    found = duckdb.sql(f"select clip_features[1:4] from '{path}' order by clip_id").fetchall()[1][0]
    expected = np.asarray(dataset.read(["clip_features"])["clip_features"].to_pylist()[1], np.float32).reshape(-1)[:4]
    np.testing.assert_allclose(np.array(found, np.float32), expected)
