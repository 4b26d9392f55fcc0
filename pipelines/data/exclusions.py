"""Clips that must not be in a corpus: the ids of other lists, and VGG-SS out of a VGGSound test split."""

from collections.abc import Callable, Sequence

from pipelines.data.corpus_lists import keys_of, read_list, sniff
from pipelines.data.entries import BATCH_ROWS, Entries, text_of
from pipelines.data.names import clip_key, start_padded, suffix_of
from pipelines.data.text_rows import local_copy, open_text, parquet_rows, text_rows
from pipelines.errors import InputError

EXCLUDE_IDS = "exclude_ids"
VGGSS = "vggss"


def exclude(
    entries: Entries, *, exclude_ids: Sequence[str] = (), vggss: str | None = None, is_vggsound: bool
) -> Entries:
    """Entries without the clips of some lists; ids are matched as stems, starts with or without leading zeros.

    Args:
        entries: what there is.
        exclude_ids: lists of any known format whose clips are taken out of every split.
        vggss: list of VGG-SS (vggss.json or its ids), whose clips are taken out of the split `test`.
        is_vggsound: the entries are VGGSound's. Without `vggss` their test clips are then counted as None: unknown.

    Returns:
        The rest; `num_excluded` has `exclude_ids` and `vggss` as far as they were asked for or should have been.

    Raises:
        InputError: a list cannot be read, or nothing is left.
    """
    counts: dict[str, int | None] = {}
    kept = entries
    if exclude_ids:
        unwanted = frozenset().union(*(read_keys(location) for location in exclude_ids))
        kept = _without(kept, lambda key, split: key in unwanted)
        counts[EXCLUDE_IDS] = entries.table.num_rows - kept.table.num_rows
    if vggss is not None:
        before, overlap = kept.table.num_rows, read_keys(vggss)
        kept = _without(kept, lambda key, split: split == "test" and key in overlap)
        counts[VGGSS] = before - kept.table.num_rows
    elif is_vggsound and "test" in kept.table["split"].unique().to_pylist():
        counts[VGGSS] = None
    if not kept.table.num_rows:
        raise InputError(f"all {entries.table.num_rows} clips are excluded; check the lists given to exclude")
    return Entries(table=kept.table, num_repeated=kept.num_repeated, kind=kept.kind, num_excluded=counts)


def read_keys(location: str) -> frozenset[str]:
    """The clip keys that a list of any known format names, starts in six digits.

    Raises:
        InputError: it cannot be read.
    """
    with local_copy(location, "list") as path:
        if suffix_of(location) == ".parquet":
            return frozenset(_key(str(row["video"])) for _, row in parquet_rows(path, location, ("video",)))
        kind, delimiter = sniff(path, location)
        if kind is not None:
            return frozenset(start_padded(key) for clip in read_list(path, location, kind) for key in keys_of(clip))
        with open_text(path, location) as file:
            rows = text_rows(file, location, delimiter)
            column = [name.strip() for name in next(rows)[1]].index("video")
            return frozenset(_key(fields[column]) for _, fields in rows if column < len(fields))


def _key(video: str) -> str:
    return start_padded(clip_key(video))


def _without(entries: Entries, is_unwanted: Callable[[str, str], bool]) -> Entries:
    mask: list[bool] = []
    for batch in entries.table.select(["video", "split"]).to_batches(max_chunksize=BATCH_ROWS):
        videos, splits = batch.column("video").to_pylist(), batch.column("split").to_pylist()
        mask += [not is_unwanted(_key(text_of(v)), split) for v, split in zip(videos, splits, strict=True)]
    return entries.keep(mask)
