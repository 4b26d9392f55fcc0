"""Conditional flow matching of a policy on real sound: how M_0 comes to be.

Every step draws, for each sample by its position: a fresh latent from the codec's posterior, noise, a time, and which
conditions are dropped. Validation uses fixed draws and never drops a condition. A row without video has the learned
nulls for clip and sync, always: it is a row whose video is dropped, whatever stands in its columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.flow_matching import flow_matching_loss, interpolate, sample_condition_drops, sample_times
from models.lora import add_adapters
from models.mmdit import SIZES
from models.policy import POLICY_FILES, Policy
from pipelines.data.contracts import FEATURES
from pipelines.data.store import CHECKPOINT, Dataset, local_folder
from pipelines.data.tables import column_to_numpy
from pipelines.training.objective import Batch, Data, DataMix, DataRef, Draws, Exported, Gather, Trainee
from pipelines.training.options import Execution, LoRA

CONDITIONS = ("clip_features", "sync_features", "text_features")
TENSORS = (*CONDITIONS, "latent_mean", "latent_std")


def tensor(rows: pa.Table, column: str) -> Tensor:
    """Return a tensor column of a table as float32 [B, ...]."""
    return torch.from_numpy(np.array(column_to_numpy(rows[column]), np.float32))


def flow_draws(draws: Draws, noise_shape: tuple[int, int], *, drop: bool) -> Batch:
    """Draw noise [B, N, C], time [B] and the two drop masks [B] (all False unless `drop`) of a batch.

    Both preference objectives and flow matching use these, so that equal positions mean equal noise in all of them.
    """
    noise, times, drop_video, drop_text = [], [], [], []
    for generator in draws.generators():
        noise.append(torch.randn(noise_shape, generator=generator))
        times.append(sample_times(1, generator))
        video, text = sample_condition_drops(1, generator)
        drop_video.append(video & drop)
        drop_text.append(text & drop)
    return {
        "noise": torch.stack(noise),
        "time": torch.cat(times),
        "drop_video": torch.cat(drop_video),
        "drop_text": torch.cat(drop_text),
    }


def load_for_training(start: str, device: torch.device, lora: LoRA | None, seed: int, execution: Execution) -> Policy:
    """Load a policy to be trained on `device`: with `lora` frozen beneath adapters started from `seed`.

    Weights go from the file to the device, never through a second copy in the host's memory.
    """
    policy = Policy.load(local_folder(start, CHECKPOINT, only=POLICY_FILES), device)
    if lora is not None:
        add_adapters(policy.network, lora.rank, lora.alpha, seed)
    if execution.activation_checkpointing:
        policy.network.checkpoint_activations = True
    if execution.compile:
        policy.network.compile_blocks()
    return policy


class FlowMatchingTrainee(Trainee):
    """The network of a policy and the flow-matching loss."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.network = policy.network
        # In a tuple, so that torch does not register it: the latent transform is fixed and not part of a checkpoint.
        self._policy = (policy,)

    @property
    def policy(self) -> Policy:
        """The policy whose network is trained."""
        return self._policy[0]

    def forward(self, batch: Batch, gather: Gather) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the batch of the flow-matching error."""
        x1 = self.policy.transform.normalize(batch["latent"])
        features = self.network.replace_with_empty(
            (batch["clip_features"], batch["sync_features"], batch["text_features"]),
            batch["drop_video"],
            batch["drop_text"],
        )
        velocity = self.network(interpolate(batch["noise"], x1, batch["time"]), *features, batch["time"])
        return flow_matching_loss(velocity, batch["noise"], x1).mean(), {}


@dataclass(frozen=True, kw_only=True)
class MixMember:
    """A dataset of features that is mixed with others."""

    features: str
    weight: int
    """Uses in a block of the sum of all weights."""
    has_validation: bool
    """Whether it has rows of the split to validate on."""


@dataclass(frozen=True, kw_only=True)
class FlowMatchingObjective:
    """Train the policy that lies at `start` (weights and fitted transform) by flow matching."""

    start: str
    features: str | tuple[MixMember, ...]
    """The dataset to train on, or those that are mixed."""
    size: str
    train_split: str = "train"
    val_split: str | None = "val"
    lora: LoRA | None = None
    """Adapters to train; None: every weight."""
    lora_seed: int = 0
    """Seed of the adapters' start."""
    execution: Execution = field(default_factory=Execution)

    name = "flow_matching"
    columns = (*TENSORS, "has_video")
    probe_every = 0
    loss_is_mean = True
    stop_on_alarm = False

    @property
    def training_data(self) -> Data:
        """Rows to train on."""
        return self._data(self.train_split, self.features)

    @property
    def validation_data(self) -> Data | None:
        """Rows to validate on: of all datasets that have some, one after the other."""
        if self.val_split is None:
            return None
        held_out = self.features
        if not isinstance(held_out, str):
            held_out = tuple(member for member in held_out if member.has_validation)
        return self._data(self.val_split, held_out)

    def _data(self, split: str, features: str | tuple[MixMember, ...]) -> Data:
        def ref(location: str) -> DataRef:
            return DataRef(location=location, contract=FEATURES.name, split=split)

        if isinstance(features, str):
            return ref(features)
        return DataMix(
            members=tuple(ref(member.features) for member in features),
            weights=tuple(member.weight for member in features),
        )

    def build(self, device: torch.device) -> Trainee:
        """Load the starting policy."""
        return FlowMatchingTrainee(load_for_training(self.start, device, self.lora, self.lora_seed, self.execution))

    def collate(self, rows: pa.Table, draws: Draws) -> Batch:
        """Conditions, a latent drawn from the codec's posterior, and the draws of flow matching.

        Where there is no video, its features are dropped, in validation too.
        """
        config = SIZES[self.size]
        mean, std = tensor(rows, "latent_mean"), tensor(rows, "latent_std")
        batch = {name: tensor(rows, name) for name in CONDITIONS}
        batch |= flow_draws(draws, (mean.shape[1], config.latent_dim), drop=draws.stream == "training")
        batch["drop_video"] |= ~_has_video(rows)
        if bool((std > 0).any()):
            posterior = Draws(draws.seed, "posterior", draws.positions).generators()
            mean = mean + std * torch.stack([torch.randn(mean.shape[1:], generator=own) for own in posterior])
        return batch | {"latent": mean}

    def export(self, trainee: Trainee, folder: Path) -> Exported:
        """Write the policy."""
        if not isinstance(trainee, FlowMatchingTrainee):
            raise TypeError(f"expected a FlowMatchingTrainee, got {type(trainee).__name__}")
        return Exported(trainee.policy.save(folder), {})


def _has_video(rows: pa.Table) -> Tensor:
    """Bool [B]."""
    return torch.tensor(rows["has_video"].to_pylist(), dtype=torch.bool)


def fit_starting_policy(size: str, seed: int, features: str, split: str, folder: Path) -> None:
    """Write a fresh policy with weights from `seed` and statistics fitted on a split, one row group at a time.

    Statistics of conditions are those of the rows with video. Of several datasets `features` is the first: what its
    latents are standardised by stays, whatever is mixed in (MMAudio's are VGGSound's), and it is its clips that the
    rounds go on with.
    """
    dataset = Dataset.open(features, FEATURES)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rows in dataset.iter_row_groups(("latent_mean", "clip_features", "sync_features", "has_video"), split):
            seen = _has_video(rows)
            yield tensor(rows, "latent_mean"), tensor(rows, "clip_features")[seen], tensor(rows, "sync_features")[seen]

    policy = Policy.create(size, seed)
    policy.fit_statistics(batches())
    folder.mkdir(parents=True, exist_ok=True)
    policy.save(folder)
