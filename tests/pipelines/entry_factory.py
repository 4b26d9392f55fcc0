"""Entries without a manifest, for tests of what is done with them."""

from typing import Any

from pipelines.data.entries import Entries, EntryBuilder, Piece


def entries_of(*rows: dict[str, Any], kind: str = "manifest") -> Entries:
    """Entries of rows that say at least `video`; lines count from 1, files lie under /data."""
    builder = EntryBuilder()
    for line, row in enumerate(rows, start=1):
        builder.add(**{"line": line, "piece": Piece(f"/data/{row['video']}"), **row})
    return builder.finish(kind=kind, location="test")
