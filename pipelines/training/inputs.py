"""Whether a dataset can be trained on at all: clips of the right shape, and some of them in the split."""

from models.spec import SPECS
from pipelines.data.store import Dataset
from pipelines.errors import InputError


def check_spec(dataset: Dataset, spec_name: str, location: str) -> None:
    """Raise InputError where the clips are not those of a named spec."""
    if dataset.spec != SPECS[spec_name]:
        raise InputError(
            f"{location} has clips of spec '{dataset.spec.name}', {dataset.spec.duration_s:g} s; this size needs "
            f"'{spec_name}', {SPECS[spec_name].duration_s:g} s"
        )


def check_split(dataset: Dataset, split: str, location: str) -> None:
    """Raise InputError where a split has no clips."""
    if dataset.num_rows(split) == 0:
        raise InputError(f"{location} has no clips of split '{split}'; it has {dataset.splits}")
