"""The card of a dataset, and a contact sheet: python jobs/inspect_dataset.py --dataset runs/a/features --sheet s.png.

Not called `inspect`: a script's folder comes first on Python's path, and jobs/inspect.py would hide the standard one.
"""

from dataclasses import dataclass
from pathlib import Path

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print what a dataset holds: rows, bytes, splits, captions, rejects, versions and lineage."""

    dataset: cli.StoragePath
    """Finished dataset of any contract."""
    sheet: cli.StoragePath | None = None
    """PNG to draw, of frames and spectrograms of some clips (features alone)."""
    num_clips: int = 8
    """Clips on the sheet, chosen by a hash of their id."""
    clip_ids: tuple[str, ...] = ()
    """Show these clips first."""

    def __post_init__(self) -> None:
        cli.require(self.num_clips >= 1, f"--num-clips must be at least 1, got {self.num_clips}")


def main(options: Options) -> int:
    """Print the card; draw the sheet."""
    from pipelines.evaluation.dataset_card import dataset_card

    print(dataset_card(options.dataset), end="")
    if options.sheet is not None:
        from pipelines.data.contracts import FEATURES
        from pipelines.data.store import Dataset
        from pipelines.evaluation.contact_sheet import contact_sheet

        picture = contact_sheet(Dataset.open(options.dataset, FEATURES), options.num_clips, options.clip_ids)
        Path(options.sheet).parent.mkdir(parents=True, exist_ok=True)
        Path(options.sheet).write_bytes(picture)
        print(f"contact sheet: {options.sheet}")
    return 0


if __name__ == "__main__":
    cli.run("inspect_dataset", Options, main)
