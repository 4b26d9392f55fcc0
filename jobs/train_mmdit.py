"""Train the MM-DiT by conditional flow matching: features -> the policy M_0."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jobs import cli
from pipelines.training.gpus import GpuName
from pipelines.training.options import PolicyTrainingOptions
from pipelines.training.schedule import ScheduleName
from pipelines.training.worker_range import NumWorkers

if TYPE_CHECKING:
    from pipelines.training.workers import WorkerGroup


@dataclass(frozen=True, kw_only=True)
class Options(PolicyTrainingOptions):
    """Train a policy on real sound. The latent transform is fitted on the training split, or inherited from --init."""

    features: tuple[cli.StoragePath, ...]
    """Features dataset of the size's clip spec; or several, which are mixed. Rows without video may be among them."""
    out: cli.StoragePath
    """Folder of the policy."""
    mix: tuple[int, ...] | None = None
    """Weight of each dataset, whole numbers: 5 1 takes five samples of the first for one of the second, exactly. By
    default its number of rows. Statistics are fitted on the first dataset."""
    size: str = "small_16k"
    """tiny, small_16k, small_44k, medium_44k, large_44k or large_44k_v2."""
    init: cli.StoragePath | None = None
    """Policy to start from, of the same size; None: fresh weights."""
    split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split to validate on."""
    num_workers: NumWorkers = 2
    """Ray Train workers; a range, as 2:8, goes on with those that are there; 0 trains in this process without Ray."""
    gpus_per_worker: Literal[0, 1] | None = None
    """GPUs of a worker; None: one where the cluster has so many now. Give 1 on a cluster that grows from nothing."""
    steps: int = 300_000
    """Optimizer steps."""
    batch_size: int = 512
    """Clips a step, over all workers and accumulation steps."""
    lr: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 1000
    """Steps over which the learning rate rises linearly."""
    schedule: ScheduleName = "steps"
    """After warm-up: constant, cosine down to zero, or two decays by ten at 80 and 90 % (steps)."""
    weight_decay: float = 1e-6
    """AdamW's decoupled weight decay."""
    ema_width: float | None = 0.05
    """Relative width of a power-function average of the weights, exported in their place; None: off."""
    dry_run: bool = False
    """Print the memory that a worker would need under each ZeRO stage, with --gpu the hours too, and touch nothing."""
    gpu: GpuName | None = None
    """With --dry-run: the workers' GPU, to say what fits it and how long the training would take."""
    gpu_gib: float | None = None
    """With --dry-run: memory of a GPU in GiB, to say what fits it; None: that of --gpu."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.require(len(self.features) > 0, "give --features one dataset or more")
        given = 0 if self.mix is None else len(self.mix)
        cli.require(self.mix is None or given == len(self.features), f"--mix has {given} weights; give one a dataset")


def main(options: Options, group: "WorkerGroup | None" = None) -> int:
    """Run the stage, in `group` if there is one; or print what it needs."""
    if options.dry_run:
        return _print_needs(options)
    from pipelines.training.stages import Launching, train_mmdit

    train_mmdit(
        features=options.features,
        mix=options.mix,
        out=options.out,
        size=options.size,
        options=options.training(),
        launching=Launching(
            num_workers=options.num_workers,
            gpus_per_worker=options.gpus_per_worker,
            group=group,
            execution=options.execution(),
            options_yaml=cli.to_yaml("train_mmdit", options),
        ),
        init=options.init,
        lora=options.lora(),
        train_split=options.split,
        val_split=options.val_split,
    )
    return 0


def _print_needs(options: Options) -> int:
    from pipelines.training.dry_run import dry_run_lines

    lines = dry_run_lines(
        options.size,
        options,
        num_workers=options.num_workers,
        reference=False,
        gpu=options.gpu,
        gpu_gib=options.gpu_gib,
    )
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    cli.run("train_mmdit", Options, main)
