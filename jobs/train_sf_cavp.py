"""Train SF-CAVP, the reward: features -> a calibrated reward with its acceptance gates."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jobs import cli
from pipelines.training.options import TrainingOptions
from pipelines.training.schedule import ScheduleName
from pipelines.training.worker_range import NumWorkers

if TYPE_CHECKING:
    from pipelines.training.workers import WorkerGroup


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions):
    """Train SF-CAVP on the training split, calibrate it on the validation split, and measure whether it may rank."""

    features: cli.StoragePath
    """Features dataset with frames and sound."""
    out: cli.StoragePath
    """Folder of the reward."""
    size: str = "base"
    """tiny, tiny_wide or base."""
    split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split to validate, calibrate and measure on."""
    codec_share: float = 0.0
    """Share of the sounds that go through the codec in training, as everything does that the reward will rank."""
    weights: cli.StoragePath | None = None
    """With --codec-share, for specs 16k and 44k: folder that import_mmaudio made, with VAE and vocoder."""
    degraded: cli.StoragePath | None = None
    """Dataset of jobs/degrade.py: sounds that a policy made worse, from whose faults the reward learns to rank."""
    degraded_every: int = 4
    """With --degraded: one sample in so many is one of those."""
    num_workers: NumWorkers = 2
    """Ray Train workers; a range, as 2:8, goes on with those that are there; 0 trains in this process without Ray."""
    gpus_per_worker: Literal[0, 1] | None = None
    """GPUs of a worker; None: one where the cluster has so many now. Give 1 on a cluster that grows from nothing."""
    steps: int = 100_000
    """Optimizer steps."""
    batch_size: int = 240
    """Clips a step, over all workers and accumulation steps."""
    lr: float = 8e-4
    """Peak learning rate."""
    warmup_steps: int = 1000
    """Steps over which the learning rate rises linearly."""
    schedule: ScheduleName = "cosine"
    """After warm-up: constant, cosine down to zero, or two decays by ten at 80 and 90 % (steps)."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay; none on norms, biases and scales."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's two decay rates."""
    ema_decay: float | None = 0.999
    """Exponential average of the weights, validated and exported in their place; None: off."""


def main(options: Options, group: "WorkerGroup | None" = None) -> int:
    """Run the stage, in `group` if there is one."""
    from pipelines.training.stages import Launching, train_sf_cavp

    train_sf_cavp(
        features=options.features,
        out=options.out,
        size=options.size,
        options=options.training(),
        launching=Launching(
            num_workers=options.num_workers,
            gpus_per_worker=options.gpus_per_worker,
            group=group,
            options_yaml=cli.to_yaml("train_sf_cavp", options),
        ),
        train_split=options.split,
        val_split=options.val_split,
        codec_share=options.codec_share,
        weights=options.weights,
        degraded=options.degraded,
        degraded_every=options.degraded_every,
    )
    return 0


if __name__ == "__main__":
    cli.run("train_sf_cavp", Options, main)
