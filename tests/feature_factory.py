"""Small finished datasets for tests: features and pairs of the tiny spec, from a seed, through the real store."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from models.spec import SPECS, ClipSpec
from pipelines.data.commits import commit_unit, dataset_manifest
from pipelines.data.contracts import FEATURES, PAIRS, REJECTS, Contract
from pipelines.data.measured import MEASURED
from pipelines.data.storage import open_folder
from pipelines.data.tables import table_from_rows
from pipelines.data.units import Unit
from pipelines.stage import StageContext, run_stage

TINY = SPECS["tiny"]
LATENT_RANK = 40
"""The random latents vary in this many directions: more than the 32 that tiny's whitening keeps."""


def feature_row(
    rng: np.random.Generator, clip_id: str, split: str, spec: ClipSpec = TINY, *, has_video: bool = True
) -> dict[str, object]:
    """One row whose latents depend on its conditions, so that training on it has something to learn."""
    cause = rng.standard_normal((spec.sync_len, spec.sync_dim)).astype(np.float32)
    mixing = np.random.default_rng(0).standard_normal((LATENT_RANK, spec.latent_dim)).astype(np.float32)
    latent = cause[: spec.latent_len, :LATENT_RANK] @ mixing
    row = {
        "clip_id": clip_id,
        "source": f"{clip_id}.mp4",
        "start_s": 0.0,
        "duration_s": spec.duration_s,
        "valid_s": spec.duration_s,
        "caption": "",
        "split": split,
        "content_hash": clip_id,
        "events": None,
        "has_video": True,
        "frames": [b"\xff\xd8"] * spec.frames_len,
        "audio": b"fLaC",
        "measures": random_measures(rng),
        **_conditions(rng, cause, spec),
        "latent_mean": latent,
        "latent_std": np.zeros_like(latent),
    }
    return row if has_video else row | without_video(row)


def without_video(row: Mapping[str, object]) -> dict[str, object]:
    """What of a row is another where there is no video."""
    zeros = {name: np.zeros_like(row[name]) for name in ("clip_features", "sync_features")}
    return {"has_video": False, "frames": [], **zeros}


def random_measures(rng: np.random.Generator) -> dict[str, object]:
    """Measures of no real clip, every column used: floats of both signs, counts, some of them null."""
    values: dict[str, object] = {}
    for name, kind, _ in MEASURED:
        if pa.types.is_list(kind):
            values[name] = []
        elif pa.types.is_integer(kind):
            values[name] = int(rng.integers(4))
        else:
            values[name] = float(rng.normal(0, 10))
    missing = ("loudness_lufs", "source_fps")
    return {name: None if name in missing and rng.random() < 0.3 else value for name, value in values.items()}


def _conditions(rng: np.random.Generator, sync: np.ndarray, spec: ClipSpec) -> dict[str, np.ndarray]:
    return {
        "clip_features": rng.standard_normal((spec.clip_len, spec.clip_dim)).astype(np.float16),
        "sync_features": sync.astype(np.float16),
        "text_features": rng.standard_normal((spec.text_len, spec.text_dim)).astype(np.float16),
    }


def write_features(
    out: Path, splits: dict[str, int], seed: int = 0, *, has_video: bool = True, prefix: str = ""
) -> Path:
    """Write a features dataset with so many rows of each split (random, not decodable frames and sound)."""
    rng = np.random.default_rng(seed)
    tables = {
        split: table_from_rows(
            [feature_row(rng, f"{prefix}{split}_{index:05d}", split, has_video=has_video) for index in range(count)],
            FEATURES,
            TINY,
        )
        for split, count in splits.items()
    }
    config = {"seed": seed, "splits": splits, "has_video": has_video, "prefix": prefix}
    return write_dataset(out, FEATURES, tables, config)


def write_pairs(out: Path, num_kept: int, num_dropped: int, policy: str = "policy", seed: int = 0) -> Path:
    """Write a pairs dataset; kept and dropped rows alternate until one kind is used up."""
    rng = np.random.default_rng(seed)
    both = min(num_kept, num_dropped)
    flags = [True, False] * both + [True] * (num_kept - both) + [False] * (num_dropped - both)
    rows = []
    for index, kept in enumerate(flags):
        feature = feature_row(rng, f"pair_{index:05d}", "rpo")
        noise = rng.standard_normal((TINY.latent_len, TINY.latent_dim)).astype(np.float32)
        rows.append(
            {
                "clip_id": feature["clip_id"],
                **{name: feature[name] for name in ("clip_features", "sync_features", "text_features")},
                "winner": feature["latent_mean"],
                "loser": np.asarray(feature["latent_mean"]) + noise,
                "winner_origin": "ground_truth",
                "loser_origin": "candidate_0",
                "rewards": [{"total": -1.0, "semantic": -0.5, "temporal": -0.5}],
                "reward_ground_truth": {"total": 1.0, "semantic": 0.5, "temporal": 0.5},
                "seeds": [index],
                "margin": 2.0,
                "kept": kept,
                "drop_reason": None if kept else "margin",
                "policy": policy,
                "reward_model": "reward",
                "round": 0,
            }
        )
    table = table_from_rows(rows, PAIRS, TINY)
    return write_dataset(out, PAIRS, {"rpo": table}, {"seed": seed, "kept": num_kept, "dropped": num_dropped})


def write_dataset(
    out: Path, contract: Contract, tables: dict[str, pa.Table], config: dict[str, object], spec: ClipSpec = TINY
) -> Path:
    """Write conforming tables, one part each, and the manifest; returns the folder."""

    def body(context: StageContext) -> None:
        for name, table in tables.items():
            unit = Unit(unit_id=name, split=name, rows=tuple(range(table.num_rows)))
            commit_unit(context.folder, unit, table, REJECTS.schema(spec).empty_table(), contract, spec)
        context.finish(dataset_manifest(open_folder(str(out)), contract, spec))

    run_stage(
        name="factory",
        config=json.loads(json.dumps(config)),
        inputs={},
        out=str(out),
        body=body,
        version=contract.version,
        say=lambda line: None,
    )
    return out
