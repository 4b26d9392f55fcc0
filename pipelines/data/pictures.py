"""Who needs pictures says so before it works: rows of sound and words alone are for the generator's training only."""

from collections.abc import Iterable

from pipelines.data.store import Dataset
from pipelines.errors import InputError


def require_pictures(features: Dataset, splits: Iterable[str | None], needed_by: str) -> None:
    """Refuse splits (None: all rows) that hold rows without video; the manifest counts them, so no row is read.

    Raises:
        InputError: there are such rows.
    """
    for split in splits:
        missing = features.num_without_video(split)
        if missing:
            where = "" if split is None else f" of split '{split}'"
            raise InputError(
                f"{features.folder.uri}: {missing} of {features.num_rows(split)} clips{where} have no video, and "
                f"{needed_by} needs every clip's picture; give features that were made without --audio-only"
            )
