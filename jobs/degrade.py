"""Sounds made worse by the generator itself: features and a policy -> what SF-CAVP learns to rank."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs import cli

if TYPE_CHECKING:
    from pipelines.training.workers import WorkerGroup


@dataclass(frozen=True, kw_only=True)
class Options:
    """Noise every real sound part of the way and let a policy finish it, from later and later to hardly any of it."""

    policy: cli.StoragePath
    """Checkpoint whose faults are wanted: M_0, or a later one."""
    features: cli.StoragePath
    """Features dataset of the clips."""
    out: cli.StoragePath
    """Folder of the degraded dataset, for train_sf_cavp --degraded."""
    weights: cli.StoragePath | None = None
    """Folder that import_mmaudio made, with the codec's networks; None: the policy's own, where it has them."""
    split: str = "train"
    """Split whose clips are used: the one that SF-CAVP is trained on."""
    num_versions: int = 3
    """Versions a clip, each worse than the one before; as many as SF-CAVP's training has edits, which is 3."""
    starts: tuple[float, float] = (0.0, 0.6)
    """Earliest and latest time at which a version starts, on the path from noise (0) to the real sound (1)."""
    blind: bool = False
    """Keep picture and caption from the policy: versions go wrong however good it is; with --starts 0.15 0.45, say."""
    num_steps: int = 25
    """Euler steps of the sampler, for whatever is left of the path."""
    guidance: float = 4.5
    """Classifier-free guidance; 1 is the conditional field alone."""
    seed: int = 0
    """Seed of starts, noise and samples."""
    max_clips: int | None = None
    """Use a seeded sample of so many clips; all by default."""
    num_workers: int = 2
    """Parallel workers; 0 works in this process without Ray."""
    gpus_per_worker: float = 0.0
    """GPUs that a worker holds; 0 works on CPUs."""
    max_reject_rate: float = 0.05
    """Share of clips that may be rejected."""

    def __post_init__(self) -> None:
        cli.require(self.num_workers >= 0 and self.gpus_per_worker >= 0, "--num-workers and --gpus-per-worker: from 0")


def main(options: Options, group: "WorkerGroup | None" = None) -> int:
    """Run the stage, in `group` if there is one."""
    from pipelines.data.units import Pool
    from pipelines.preferences.candidates import Sampling
    from pipelines.preferences.degraded import DegradeInputs, DegradeSettings, degrade

    degrade(
        DegradeInputs(policy=options.policy, features=options.features, split=options.split, weights=options.weights),
        DegradeSettings(
            num_versions=options.num_versions,
            starts=options.starts,
            blind=options.blind,
            sampling=Sampling(num_steps=options.num_steps, guidance=options.guidance),
            seed=options.seed,
            max_clips=options.max_clips,
        ),
        out=options.out,
        pool=Pool(num_workers=options.num_workers, num_gpus=options.gpus_per_worker, group=group),
        max_reject_rate=options.max_reject_rate,
        options_yaml=cli.to_yaml("degrade", options),
    )
    return 0


if __name__ == "__main__":
    cli.run("degrade", Options, main)
