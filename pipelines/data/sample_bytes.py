"""What a training sample costs to read: compressed bytes in the columns a training projects, from Parquet footers.

Parquet reads a column only where it is asked for, so a sample costs its share of these column chunks and nothing of
frames or audio. The measure beside it is a store of plain float32 tensors, as MMAudio's memory maps are: 1.207 MB a
clip at 16 kHz and 1.278 MB at 44.1 kHz.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.store import Dataset
from pipelines.errors import ContractError, InputError

MAX_FOOTERS = 64
"""Parts whose footers are read, evenly spread: every part holds the same columns of the same shapes."""
MEGABYTE = 1e6


@dataclass(frozen=True, kw_only=True)
class SampleBytes:
    """Mean bytes of one row, by column."""

    columns: Mapping[str, float]
    """Compressed, as stored."""
    float32: int
    """The same tensors uncompressed in float32."""

    @property
    def total(self) -> float:
        """Bytes read for one sample."""
        return sum(self.columns.values())

    @property
    def line(self) -> str:
        """`a training sample reads 0.628 MB (clip_features 0.120, ...); as plain float32 1.278 MB: 0.49 of it`."""
        parts = ", ".join(f"{name} {size / MEGABYTE:.3f}" for name, size in self.columns.items())
        return (
            f"a training sample reads {self.total / MEGABYTE:.3f} MB ({parts}); as plain float32, as MMAudio stores "
            f"it, {self.float32 / MEGABYTE:.3f} MB: {self.total / self.float32:.2f} of it"
        )


def sample_bytes(dataset: Dataset, columns: Sequence[str], split: str | None = None) -> SampleBytes:
    """Measure what one row of a split (None: of all) reads of some tensor columns.

    Exact up to `MAX_FOOTERS` parts; of more, from so many of them.

    Raises:
        InputError: the split has no rows.
        ContractError: there is no such column, or it holds no tensor.
    """
    parts = [part for part in dataset.parts if split in (None, part.split)]
    if not parts:
        raise InputError(f"{dataset.folder.uri} has no clips of split '{split}'; it has {dataset.splits}")
    num_read = min(len(parts), MAX_FOOTERS)
    chosen = [parts[index * len(parts) // num_read] for index in range(num_read)]
    totals = dict.fromkeys(columns, 0)
    float32 = sum(4 * math.prod(_shape(dataset, name)) for name in columns)
    for part in chosen:
        metadata = dataset.folder.use_file(part.path, lambda file: pq.ParquetFile(file).metadata)
        for group in range(metadata.num_row_groups):
            chunks = (metadata.row_group(group).column(leaf) for leaf in range(metadata.num_columns))
            for chunk in chunks:
                # The path of a leaf: `clip_features.list.element`.
                name = chunk.path_in_schema.split(".", 1)[0]
                if name in totals:
                    totals[name] += chunk.total_compressed_size
    rows = sum(part.rows for part in chosen)
    return SampleBytes(columns={name: total / rows for name, total in totals.items()}, float32=float32)


def _shape(dataset: Dataset, column: str) -> Sequence[int]:
    kind = dataset.contract.column(column).type(dataset.spec)
    if not isinstance(kind, pa.FixedShapeTensorType):
        raise ContractError(f"column '{column}' of {dataset.contract.name} is {kind} and no tensor")
    return kind.shape
