"""A training objective of a few hundred weights on real feature rows, for tests of the loop and not of learning."""

import dataclasses
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from models.weights import save_weights
from pipelines.data.contracts import FEATURES
from pipelines.data.tables import column_to_numpy
from pipelines.training.objective import Batch, DataRef, Draws, Exported, Gather, Trainee

HUNGER_BYTES = 2**30


def allocate_within(size_bytes: int, memory_bytes: int) -> None:
    """Allocate so much where no more than `memory_bytes` of address space are left to this process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, before[1]))
    try:
        torch.empty(size_bytes, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def stop_once(mark: Path, kind: str) -> None:
    """Leave this process's id in a file and hang; where the file is there, do nothing."""
    if mark.exists():
        return
    mark.write_text(str(os.getpid()))
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(10**6)


class ToyTrainee(Trainee):
    """Regress a clip's mean latent from its text features, with noise in the target and a batch-wide term."""

    def __init__(self, objective: "ToyObjective") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        middle = nn.BatchNorm1d(12) if objective.batch_norm else nn.Tanh()
        self.net = nn.Sequential(nn.Linear(64, 12), middle, nn.Linear(12, 160))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        self.objective = objective
        self._steps_watched = 0.0

    def forward(self, batch: Batch, gather: Gather) -> tuple[Tensor, dict[str, Tensor]]:
        prediction = self.net(batch["text"])
        error = (prediction - batch["target"]).square().mean()
        # Depends on the whole global batch, as a contrastive loss does.
        spread = gather(prediction).var(dim=0, unbiased=False).mean()
        loss = error if self.objective.loss_is_mean else error + 0.1 * spread
        if self.objective.bad_validation and not self.training:
            loss = loss * float("nan")
        if self.training:
            self._wait(batch)
            factor = self._faults(batch)
            loss = loss * factor
            if self.objective.big_gradient_alone:
                loss = loss - loss.detach() * (1 - 1 / factor)
        return loss, {"error": error.detach()}

    def alarm(self, metrics: dict[str, float]) -> str | None:
        self._steps_watched += 1
        return "too long a run" if self.objective.alarm_at and self._steps_watched >= self.objective.alarm_at else None

    def watch_state(self) -> dict[str, float]:
        return {"steps_watched": self._steps_watched}

    def load_watch_state(self, state: dict[str, float]) -> None:
        self._steps_watched = state["steps_watched"]

    def _wait(self, batch: Batch) -> None:
        objective = self.objective
        step = int(batch["position"].max()) // objective.batch_size
        time.sleep(objective.step_s)
        while any(step >= first and not Path(file).exists() for first, file in objective.holds):
            time.sleep(0.05)

    def _faults(self, batch: Batch) -> float:
        objective = self.objective
        step = int(batch["position"].max()) // objective.batch_size
        if bool(batch["poison"].any()):
            return float("nan")
        if step >= objective.hungry_from and objective.batch_size - 1 in batch["position"] % objective.batch_size:
            # Only the rank that holds the last sample of the batch meets it.
            allocate_within(len(batch["position"]) * HUNGER_BYTES, objective.memory_bytes)
        if step in objective.bad_steps and 0 in batch["position"] % objective.batch_size:
            # Only the rank that holds the first sample of the batch meets it.
            return float("nan")
        if objective.kill_file and step >= objective.kill_at:
            mark = Path(objective.kill_file)
            if not mark.exists():
                mark.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
        if step == objective.big_step:
            return objective.big_factor
        if objective.stop_file and step >= objective.stop_at and 1 in batch["position"] % objective.batch_size:
            stop_once(Path(objective.stop_file), objective.stop_kind)
        if step == objective.defect_at:
            raise KeyError("a defect in the objective")
        return 1.0


@dataclass(frozen=True, kw_only=True)
class ToyObjective:
    """The toy with its injected faults."""

    features: str
    batch_size: int = 8
    bad_steps: tuple[int, ...] = ()
    """Steps whose loss is not finite, whatever their samples are."""
    batch_norm: bool = False
    """Has statistics that every forward pass changes."""
    bad_validation: bool = False
    """The loss is never finite in validation."""
    poison: tuple[str, ...] = ()
    """Clips that make the loss of their batch not finite."""
    hungry_from: int = sys.maxsize
    """Step from which every sample of a forward really wants `HUNGER_BYTES`, of the `memory_bytes` there are."""
    memory_bytes: int = 0
    big_step: int = -1
    """Step whose loss and gradients are `big_factor` times what they should be."""
    big_factor: float = 1e3
    big_gradient_alone: bool = False
    """The loss itself stays as it is."""
    loss_is_mean: bool = False
    """Without the term over the whole batch."""
    stop_at: int = 0
    stop_file: str = ""
    """Once, from step `stop_at` on, the rank with the second sample leaves its process id there and hangs."""
    stop_kind: str = "stop"
    """`stop`: the process is stopped; `sleep`: it sleeps for ever and could still be talked to."""
    holds: tuple[tuple[int, str], ...] = ()
    """From each of these steps on every rank waits until the file beside it is there."""
    keys_folder: str = ""
    """Where every process leaves which clip it read for which position of a training."""
    kill_at: int = -1
    kill_file: str = ""
    defect_at: int = -1
    step_s: float = 0.0
    alarm_at: int = 0
    """Steps after which there is an alarm; 0: never."""
    strict: bool = False

    name = "toy"
    columns = ("clip_id", "text_features", "latent_mean")
    probe_every = 0

    @property
    def stop_on_alarm(self) -> bool:
        return self.strict

    @property
    def training_data(self) -> DataRef:
        return DataRef(location=self.features, contract=FEATURES.name, split="train")

    @property
    def validation_data(self) -> DataRef | None:
        return DataRef(location=self.features, contract=FEATURES.name, split="val")

    def build(self, device: torch.device) -> Trainee:
        return ToyTrainee(self)

    def collate(self, rows: pa.Table, draws: Draws) -> Batch:
        if self.keys_folder and draws.stream == "training":
            with Path(self.keys_folder, f"{os.getpid()}.txt").open("a") as file:
                lines = zip(draws.positions, rows["clip_id"].to_pylist(), strict=True)
                file.writelines(f"{position} {clip}\n" for position, clip in lines)
        latent = np.array(column_to_numpy(rows["latent_mean"]), np.float32).mean(axis=1)
        noise = torch.stack([torch.randn(160, generator=generator) for generator in draws.generators()])
        return {
            "text": torch.from_numpy(np.array(column_to_numpy(rows["text_features"]), np.float32).mean(axis=1)),
            "target": torch.from_numpy(latent) + 0.1 * noise,
            "position": torch.tensor(draws.positions),
            "poison": torch.tensor([clip in self.poison for clip in rows["clip_id"].to_pylist()]),
        }

    def export(self, trainee: Trainee, folder: Path) -> Exported:
        assert isinstance(trainee, ToyTrainee)
        save_weights(folder / "toy.safetensors", trainee.state_dict())
        return Exported(["toy.safetensors"], {"num_weights": float(sum(p.numel() for p in trainee.parameters()))})

    def faultless(self) -> "ToyObjective":
        """The same training without any fault."""
        return dataclasses.replace(
            self,
            kill_at=-1,
            kill_file="",
            bad_steps=(),
            defect_at=-1,
            stop_file="",
            holds=(),
            poison=(),
            big_step=-1,
        )
