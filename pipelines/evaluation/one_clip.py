"""docs/one-clip.md: one real row after every stage, read from the artifacts of a finished demo.

python -m pipelines.evaluation.one_clip runs/demo docs/one-clip.md
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.contracts import DEGRADED, FEATURES, PAIRS, SCORES, Contract
from pipelines.data.store import Dataset
from pipelines.data.tables import column_to_numpy
from pipelines.errors import InputError
from pipelines.evaluation.shown_clips import row_groups_with

HEAD = """# One clip, after every stage

Written by `python -m pipelines.evaluation.one_clip runs/demo docs/one-clip.md` from the rows of a finished `make demo`:
nothing here is typed by hand. Splits never mix, so the clip that pairs are made of (`rpo`) is not the one that scores
are made of (`test`). What every column means is in [datasets.md](datasets.md).
"""


def one_clip_page(demo: Path) -> str:
    """The page as Markdown.

    Raises:
        InputError: the folder holds no finished demo.
    """
    features = Dataset.open(str(demo / "features"), FEATURES)
    degraded = Dataset.open(str(demo / "degraded"), DEGRADED)
    pairs = Dataset.open(str(demo / "rpo" / "round_0" / "pairs"), PAIRS)
    scores = Dataset.open(str(demo / "scores" / "m0"), SCORES)
    paired, scored = _first_kept(pairs), _first_id(scores)
    sections = [
        ("After `preprocess`: a row of features", FEATURES, features, paired),
        ("After `degrade`: a row of degraded sounds", DEGRADED, degraded, _first_id(degraded)),
        ("After `generate_preferences`: a row of pairs", PAIRS, pairs, paired),
        ("After `evaluate`: a row of scores, of M_0", SCORES, scores, scored),
    ]
    parts = [HEAD]
    for title, contract, dataset, clip_id in sections:
        parts.append(f"## {title}\n\n{row_table(contract, read_row(dataset, contract, clip_id))}\n")
    return "\n".join(parts)


def row_table(contract: Contract, row: pa.Table) -> str:
    """A table of one row as Markdown: a line for each column of the contract."""
    lines = ["| column | value |", "|---|---|"]
    lines += [f"| `{column.name}` | {_shown(row[column.name])} |" for column in contract.columns]
    return "\n".join(lines)


def read_row(dataset: Dataset, contract: Contract, clip_id: str) -> pa.Table:
    """The row of one clip, every column.

    Raises:
        InputError: the dataset has no such clip.
    """
    names = [column.name for column in contract.columns]
    for part, index, clip_ids in row_groups_with(dataset, {clip_id}):
        return dataset.read_row_group(part, index, names).slice(clip_ids.index(clip_id), 1)
    raise InputError(f"{dataset.folder.uri} has no clip {clip_id!r}")


def _first_kept(pairs: Dataset) -> str:
    table = pairs.read(["clip_id", "kept"])
    kept = [row["clip_id"] for row in table.to_pylist() if row["kept"]]
    if not kept:
        raise InputError(f"{pairs.folder.uri} kept no pair")
    return min(kept)


def _first_id(scores: Dataset) -> str:
    return min(scores.read(["clip_id"])["clip_id"].to_pylist())


def _shown(column: pa.ChunkedArray) -> str:
    if isinstance(column.type, pa.FixedShapeTensorType):
        return _tensor(column_to_numpy(column)[0])
    return _value(column[0].as_py())


def _tensor(values: np.ndarray) -> str:
    shape = " x ".join(map(str, values.shape))
    wide = values.astype(np.float64)
    return f"{values.dtype} {shape}, from {wide.min():.3g} to {wide.max():.3g}, mean {wide.mean():.3g}"


def _value(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes, beginning `{value[:4].hex(' ')}`"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return _list(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(entry)}" for name, entry in value.items())
    # A source is a path of the machine that made the row; its name is enough here.
    text = value.rsplit("/", 1)[-1] if isinstance(value, str) else json.dumps(value)
    return f"`{text}`" if text else "empty"


def _list(values: list[Any]) -> str:
    if not values:
        return "empty"
    if isinstance(values[0], bytes):
        return f"{len(values)} pictures; the first has {_value(values[0])}"
    if isinstance(values[0], float):
        return f"{len(values)} numbers, from {min(values):.3g} to {max(values):.3g}"
    return "<br>".join(_value(entry) for entry in values)


def main() -> None:
    """Write the page of the demo folder named first to the file named second."""
    Path(sys.argv[2]).write_text(one_clip_page(Path(sys.argv[1])), encoding="utf-8")


if __name__ == "__main__":
    main()
