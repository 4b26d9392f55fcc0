"""Small conforming rows of every contract, seeded; for tests of the store that need no models."""

import numpy as np
import pyarrow as pa

from models.spec import SPECS, ClipSpec
from pipelines.data.contracts import Contract

TINY = SPECS["tiny"]


def _value(kind: pa.DataType, nullable: bool, text: str, rng: np.random.Generator) -> object:
    if isinstance(kind, pa.FixedShapeTensorType):
        return rng.standard_normal(kind.shape).astype(kind.value_type.to_pandas_dtype())
    plain = (
        (pa.types.is_string, lambda: text),
        (pa.types.is_floating, lambda: float(rng.standard_normal())),
        (pa.types.is_integer, lambda: int(rng.integers(100))),
        (pa.types.is_boolean, lambda: True),
        (pa.types.is_binary, lambda: rng.bytes(16)),
    )
    for matches, make in plain:
        if matches(kind):
            return make()
    if nullable:
        return None
    if pa.types.is_list(kind):
        return [rng.bytes(8)] if pa.types.is_binary(kind.value_type) else []
    return {field.name: _member(field.type) for field in kind}


def _member(kind: pa.DataType) -> object:
    return [] if pa.types.is_list(kind) else 0.5 if pa.types.is_floating(kind) else 1


def make_row(contract: Contract, clip_id: str, seed: int = 0, split: str = "train", spec: ClipSpec = TINY) -> dict:
    """One row of a contract with seeded values of the right types."""
    rng = np.random.default_rng([seed, *clip_id.encode()])
    row = {f.name: _value(f.type, f.nullable, f"{f.name} of {clip_id}", rng) for f in contract.schema(spec)}
    row["clip_id"] = clip_id
    if "split" in row:
        row["split"] = split
    if "reason" in row:
        row["reason"] = "missing"
    return row
