"""Several datasets of features as the input of one training: what may be mixed, in which shares, and how it is told.

Weights are whole numbers, so that shares are exact and not drawn; without any, every row comes equally often.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.mmdit import SPEC_OF_SIZE
from pipelines.data.contracts import FEATURES
from pipelines.data.sample_bytes import sample_bytes
from pipelines.data.store import Dataset
from pipelines.errors import InputError
from pipelines.training.flow_matching_objective import TENSORS, MixMember
from pipelines.training.inputs import check_spec, check_split

MAX_WEIGHT = 1_000_000
"""A block of positions holds every dataset as often as its weight says, and is drawn in memory."""


@dataclass(frozen=True)
class Mixture:
    """Datasets with rows of one split, in shares; or one dataset."""

    datasets: tuple[Dataset, ...]
    weights: tuple[int, ...]
    """Without a common divisor."""
    split: str

    @property
    def first(self) -> Dataset:
        """The dataset that statistics are fitted on."""
        return self.datasets[0]

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints for a stage, by role: `features`, `features_2`, ..."""
        roles = ["features", *(f"features_{number}" for number in range(2, len(self.datasets) + 1))]
        return {role: dataset.fingerprint for role, dataset in zip(roles, self.datasets, strict=True)}

    @property
    def affecting_bytes(self) -> dict[str, Any]:
        """What enters a fingerprint beside the inputs; nothing of one dataset."""
        return {} if len(self.datasets) == 1 else {"mix": list(self.weights)}

    @property
    def lineage(self) -> dict[str, Any]:
        """What the manifest tells of every dataset; nothing of one, which is the input."""
        if len(self.datasets) == 1:
            return {}
        members = [
            {
                "features": dataset.folder.uri,
                "fingerprint": dataset.fingerprint,
                "weight": weight,
                "rows": dataset.num_rows(self.split),
                "without_video": dataset.num_without_video(self.split),
            }
            for dataset, weight in zip(self.datasets, self.weights, strict=True)
        ]
        return {"mixture": members}

    def has_rows(self, split: str) -> bool:
        """Whether one of the datasets has rows of a split."""
        return any(dataset.num_rows(split) for dataset in self.datasets)

    def members(self, val_split: str) -> str | tuple[MixMember, ...]:
        """What the objective reads."""
        if len(self.datasets) == 1:
            return self.first.folder.uri
        return tuple(
            MixMember(features=dataset.folder.uri, weight=weight, has_validation=dataset.num_rows(val_split) > 0)
            for dataset, weight in zip(self.datasets, self.weights, strict=True)
        )

    def require_video_first(self) -> None:
        """Raise InputError where the first dataset has no row with video: statistics of pictures are fitted on it."""
        if self.first.num_without_video(self.split) == self.first.num_rows(self.split):
            raise InputError(
                f"{self.first.folder.uri} has no clip with video in split '{self.split}', and this size standardises "
                "the features of pictures: name a dataset with video first, or start from a policy with --init"
            )

    def reading_cost(self) -> tuple[float, list[str]]:
        """Mean bytes that one sample reads, and a line for each dataset."""
        found = [sample_bytes(dataset, TENSORS, self.split) for dataset in self.datasets]
        mean = sum(w * read.total for w, read in zip(self.weights, found, strict=True)) / sum(self.weights)
        if len(found) == 1:
            return mean, [found[0].line]
        lines = [
            f"{weight} of {sum(self.weights)} samples from {dataset.folder.uri}: {read.line}"
            for dataset, weight, read in zip(self.datasets, self.weights, found, strict=True)
        ]
        return mean, lines


def open_mixture(features: Sequence[str], weights: Sequence[int] | None, size: str, split: str) -> Mixture:
    """Open the datasets at some places and mix them for a policy of a named size, as `mix_datasets`.

    Raises:
        InputError: as `mix_datasets`, or a dataset is not there, of another spec, or without rows of the split.
    """
    datasets = [Dataset.open(location, FEATURES) for location in features]
    for location, dataset in zip(features, datasets, strict=True):
        check_spec(dataset, SPEC_OF_SIZE[size], location)
        check_split(dataset, split, location)
    return mix_datasets(datasets, weights, split)


def mix_datasets(datasets: Sequence[Dataset], weights: Sequence[int] | None, split: str) -> Mixture:
    """Put datasets, each with rows of `split`, together.

    Args:
        datasets: of one clip spec.
        weights: of each dataset; None: its number of rows, which makes one of all.
        split: that is trained on.

    Raises:
        InputError: weights that do not fit, a dataset given twice, or encoded by other networks than the first.
    """
    shares = [dataset.num_rows(split) for dataset in datasets] if weights is None else list(weights)
    if len(shares) != len(datasets):
        raise InputError(
            f"{len(shares)} weights of --mix for {len(datasets)} datasets of --features; give one for each"
        )
    if weights is not None and not all(1 <= weight <= MAX_WEIGHT for weight in weights):
        given = " ".join(map(str, weights))
        raise InputError(
            f"--mix {given}: weights are whole numbers from 1 to {MAX_WEIGHT}; leave a dataset out instead"
        )
    first, seen = datasets[0], dict[str, str]()
    for dataset in datasets:
        uri = dataset.folder.uri
        if dataset.fingerprint in seen:
            raise InputError(f"{seen[dataset.fingerprint]} and {uri} are the same dataset; raise its weight with --mix")
        seen[dataset.fingerprint] = uri
        own, others = first.manifest.get("frozen", {}), dataset.manifest.get("frozen", {})
        differing = sorted(role for role in {*own, *others} if own.get(role) != others.get(role))
        if differing:
            raise InputError(
                f"{first.folder.uri} and {uri} were encoded by other networks ({', '.join(differing)}): their features "
                "do not mean the same; make one of them again with the --weights of the other"
            )
    divisor = math.gcd(*shares)
    return Mixture(tuple(datasets), tuple(share // divisor for share in shares), split)
