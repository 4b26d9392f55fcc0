"""What the loop asks of an objective, and what it gives it.

The loop knows nothing of sound: an `Objective` (a small picklable description) names the columns it reads, turns rows
into a batch, builds a `Trainee` (the network with its loss), and exports it. Every random draw of a sample is keyed by
(seed, stream, global sample position), never by rank or by worker, so the same samples get the same noise
for any number of workers, after any resume.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Gather = Callable[[Tensor], Tensor]
"""[B, ...] on one rank -> [world * B, ...] on every rank, with gradient."""

Stream = Literal["training", "validation", "posterior"]
_STREAMS: dict[Stream, int] = {"training": 0, "validation": 1, "posterior": 2}


def sample_generator(seed: int, stream: Stream, position: int) -> torch.Generator:
    """Return the CPU generator of one sample: a function of its position alone."""
    key = np.random.SeedSequence((seed, _STREAMS[stream], position)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key) & (2**63 - 1))


@dataclass(frozen=True)
class Draws:
    """The generators of the samples of one batch, in order."""

    seed: int
    stream: Stream
    positions: tuple[int, ...]

    def generators(self) -> list[torch.Generator]:
        """Return a fresh generator for every sample; always the same ones."""
        return [sample_generator(self.seed, self.stream, position) for position in self.positions]


@dataclass(frozen=True, kw_only=True)
class DataRef:
    """The rows of one split of a finished dataset."""

    location: str
    contract: str
    """Name of the contract in `pipelines.data.contracts.CONTRACTS`."""
    split: str | None
    """None: all rows (a dataset of pairs has no splits)."""
    keep_column: str | None = None
    """A boolean column; rows where it is false are left out."""


@dataclass(frozen=True, kw_only=True)
class DataMix:
    """Rows of several datasets, in the given shares."""

    members: tuple[DataRef, ...]
    weights: tuple[int, ...]
    """Of each member, at least 1: how often it comes in sum(weights) samples."""


Data = DataRef | DataMix


class Trainee(nn.Module, ABC):
    """A network and its loss as one module, so that ZeRO-3 sees every use of a parameter inside `forward`.

    What is frozen and not saved (a reference policy) is kept out of the module's registered children.
    """

    @abstractmethod
    def forward(self, batch: Batch, gather: Gather) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (scalar, mean over the batch) and scalar metrics, detached, with the same names always.

        In eval mode the same on validation rows.
        """

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Return AdamW's groups; here all trainable parameters with the same decay."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": trainable, "weight_decay": weight_decay}]

    def summarise(self, metrics: dict[str, float]) -> dict[str, float]:
        """Turn one step's metrics, averaged over micro batches and ranks, into what is written down."""
        return metrics

    def probe(self, batch: Batch, gather: Gather) -> dict[str, float]:
        """Return costly metrics (extra backward passes) that are asked for every few steps; none by default."""
        return {}

    def alarm(self, metrics: dict[str, float]) -> str | None:
        """Look at one step's metrics (means over ranks); return one line if something is wrong, else None."""
        return None

    def watch_state(self) -> dict[str, float]:
        """Return what `alarm` has gathered, for a checkpoint."""
        return {}

    def load_watch_state(self, state: dict[str, float]) -> None:
        """Continue from `watch_state()`."""


@dataclass(frozen=True)
class Exported:
    """What an objective wrote for the next stage."""

    files: list[str]
    """Names inside the folder."""
    metrics: dict[str, float]


class Objective(Protocol):
    """Picklable description of what is trained, on which rows."""

    @property
    def name(self) -> str:
        """Short name for logs and metrics."""
        ...

    @property
    def training_data(self) -> Data:
        """Rows to train on."""
        ...

    @property
    def validation_data(self) -> Data | None:
        """Rows to validate on, or None."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns it reads; nothing else leaves the disk. See `RowGroups` for one that a dataset does not have."""
        ...

    @property
    def probe_every(self) -> int:
        """Steps between calls of `Trainee.probe`; 0: never."""
        ...

    @property
    def loss_is_mean(self) -> bool:
        """Whether the loss of a batch is the mean over its samples, so that micro batches of any size give the same."""
        ...

    @property
    def stop_on_alarm(self) -> bool:
        """Whether an alarm ends the run, with the weights of that step exported; otherwise it is only reported."""
        ...

    def build(self, device: torch.device) -> Trainee:
        """Build the trainee with its starting weights: the same on every rank and after every restart."""
        ...

    def collate(self, rows: pa.Table, draws: Draws) -> Batch:
        """Turn rows into CPU tensors, random draws included, one generator a row."""
        ...

    def export(self, trainee: Trainee, folder: Path) -> Exported:
        """Write what the next stage loads into `folder`; called on rank 0 alone, with the weights whole."""
        ...
