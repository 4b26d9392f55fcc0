"""Whether a dataset can be trained on at all: clips of the right shape, and some of them in the split."""

from models.sf_cavp_views import LOSS_CONFIGS
from models.spec import SPECS
from pipelines.data.contracts import DEGRADED
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


def check_degraded(location: str, every: int, features: Dataset, split: str, size: str) -> str:
    """Fingerprint of a dataset of degraded sounds for an SF-CAVP of a named size, trained on a split of features.

    Raises:
        InputError: it is not there, empty or of other clips than the split's (the reward would be calibrated on, or
            rank, clips that it has seen), or has not as many versions a clip as the size needs.
    """
    dataset = Dataset.open(location, DEGRADED)
    check_spec(dataset, features.spec.name, location)
    made_of = dataset.manifest["inputs"].get("features"), dataset.manifest["config"].get("split")
    if made_of != (features.fingerprint, split):
        what = f"split '{made_of[1]}'" if made_of[0] == features.fingerprint else "other features"
        raise InputError(
            f"{location} was made of {what}, and the training is on split '{split}' of {features.folder.uri}: the "
            "reward may see no other clips; make it with jobs/degrade.py of these"
        )
    needed, found = LOSS_CONFIGS[size].num_edits, dataset.manifest.get("num_versions")
    if dataset.num_rows() == 0:
        raise InputError(f"{location} has no clips; look at its rejects")
    if found != needed:
        raise InputError(
            f"{location} has {found} versions a clip, SF-CAVP of size {size} takes {needed}: "
            f"make it with jobs/degrade.py --num-versions {needed}"
        )
    if every < 2:
        raise InputError(f"--degraded-every must be at least 2, got {every}")
    return dataset.fingerprint
