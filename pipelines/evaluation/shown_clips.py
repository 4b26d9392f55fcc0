"""Which clips people look at and listen to, and their rows."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipelines.data.store import Dataset, Part
from pipelines.errors import InputError
from pipelines.preferences.pairs import stable_seed

TRUTH_COLUMNS = ("clip_id", "caption", "events", "frames", "audio", "duration_s")
SOUND_COLUMNS = (
    "clip_id",
    "reward",
    "offset_s",
    "invalid_reason",
    "num_events",
    "num_detected",
    "num_matched",
    "num_class_matched",
    "mel_distance",
    "audio",
)


def choose_clips(clip_ids: Sequence[str], num_clips: int, first: Sequence[str] = ()) -> list[str]:
    """The clips to show: those asked for, then by a hash of their id, so that no number decides what is heard.

    Raises:
        InputError: a clip that was asked for was not scored.
    """
    unknown = set(first) - set(clip_ids)
    if unknown:
        raise InputError(f"--clip-ids: {min(unknown)!r} is not among the {len(clip_ids)} scored clips")
    lots = sorted(clip_ids, key=lambda clip_id: stable_seed("listening page", clip_id))
    return list(dict.fromkeys([*first, *lots]))[: max(num_clips, len(first))]


def read_clips(dataset: Dataset, clip_ids: Sequence[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows of some clips by id; whole columns are read only of the row groups that hold one of them.

    Raises:
        InputError: a clip is not in the dataset.
    """
    wanted = set(clip_ids)
    rows: dict[str, dict[str, Any]] = {}
    for part, index, here in row_groups_with(dataset, wanted):
        table = dataset.read_row_group(part, index, columns)
        chosen = pa.array([clip_id in wanted for clip_id in here])
        rows |= {row["clip_id"]: row for row in table.filter(chosen).to_pylist()}
    lost = wanted - set(rows)
    if lost:
        raise InputError(f"{dataset.folder.uri} has no clip {min(lost)!r}; its scores were made from other features")
    return rows


def row_groups_with(dataset: Dataset, clip_ids: Collection[str]) -> Iterator[tuple[Part, int, list[str]]]:
    """Part, index and all clip ids of every row group that holds one of `clip_ids`; only the ids are read."""
    for part in dataset.parts:
        for index in range(len(part.row_groups)):
            here = dataset.read_row_group(part, index, ["clip_id"])["clip_id"].to_pylist()
            if any(clip_id in clip_ids for clip_id in here):
                yield part, index, here
