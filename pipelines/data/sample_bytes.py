"""How many bytes a training sample costs to read, as they lie on the disk: what storage and network have to deliver."""

from collections.abc import Sequence

import pyarrow.parquet as pq

from pipelines.data.store import Dataset

MMAUDIO_BYTES = {"16k": 1.207e6, "44k": 1.278e6}
"""Bytes a clip of MMAudio's memory maps, by clip spec: the same five tensors, all float32."""


MAX_PARTS = 32


def sample_bytes(dataset: Dataset, columns: Sequence[str], split: str | None = None) -> dict[str, float]:
    """Compressed bytes a row of each projected column, from the footers of up to 32 parts spread over a split.

    Raises:
        ValueError: the split has no rows.
    """
    totals = dict.fromkeys(columns, 0)
    num_rows = 0
    own = [part for part in dataset.parts if split in (None, part.split)]
    for part in own[:: -(-len(own) // MAX_PARTS) or 1]:
        with dataset.folder.filesystem.open_input_file(dataset.folder.join(part.path)) as file:
            metadata = pq.read_metadata(file)
        num_rows += metadata.num_rows
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(index)
                # A tensor's values lie in a leaf below its name.
                name = chunk.path_in_schema.split(".")[0]
                if name in totals:
                    totals[name] += chunk.total_compressed_size
    if num_rows == 0:
        raise ValueError(f"{dataset.folder.uri} has no rows of split '{split}'")
    return {name: total / num_rows for name, total in totals.items()}


def sample_bytes_line(found: dict[str, float], spec_name: str) -> str:
    """The same for people, beside what the original's store reads where it has one."""
    total = sum(found.values())
    parts = ", ".join(f"{name.removesuffix('_features')} {size / 1e3:.1f}" for name, size in found.items())
    line = f"a training sample reads {total / 1e3:.1f} kB ({parts})"
    if spec_name not in MMAUDIO_BYTES:
        return line
    original = MMAUDIO_BYTES[spec_name]
    return f"{line}; MMAudio's float32 store reads {original / 1e3:.0f} kB: {total / original:.2f} of it"
