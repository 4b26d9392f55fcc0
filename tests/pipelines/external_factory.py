"""External files as users would write them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file


def clip_names(count: int) -> list[str]:
    return [f"clip_{i:06d}" for i in range(count)]


def write_external(path: Path, clip_ids: Sequence[str], values: np.ndarray) -> str:
    """Write rows in the form that the suffix asks for; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        rows = pa.array(list(values), pa.list_(pa.from_numpy_dtype(values.dtype)))
        pq.write_table(pa.table({"clip_id": list(clip_ids), "embedding": rows, "label": ["x"] * len(values)}), path)
    elif path.suffix == ".npz":
        np.savez(path, clip_id=np.array(clip_ids), embedding=values, duration_s=np.ones(len(values)))
    else:
        save_file({"embedding": values}, path, metadata={"clip_id": json.dumps(list(clip_ids))})
    return str(path)
