"""features -> measures of every clip, and a page: python jobs/measure.py --features runs/a/features --out runs/a/m."""

from dataclasses import dataclass

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Lay out what clips can be filtered by: level, silence, motion, cuts, and whether sound and picture fit."""

    features: cli.StoragePath
    """Features dataset whose clips are measured."""
    out: cli.StoragePath
    """Folder of the measures dataset to make; its page is report/index.html there."""
    reward: cli.StoragePath | None = None
    """Trained SF-CAVP that tells whether sound and picture fit, and how late the sound is; None: not told."""
    num_examples: int = 3
    """Clips shown at each end of a measure."""
    num_workers: int = 2
    """Workers of the pool; 0 works in this process without Ray. Changes no byte of the result."""
    gpus_per_worker: float = 0.0
    """GPUs that a worker holds for the reward; 0 works on CPUs."""

    def __post_init__(self) -> None:
        cli.require(self.num_examples >= 1, f"--num-examples must be at least 1, got {self.num_examples}")
        cli.require(self.num_workers >= 0 and self.gpus_per_worker >= 0, "--num-workers and --gpus-per-worker: from 0")


def main(options: Options) -> int:
    """Make the dataset and say where its page is."""
    from pipelines.curation.measure import measure
    from pipelines.curation.report import PAGE, ReportSettings
    from pipelines.data.units import Pool

    measure(
        options.features,
        options.reward,
        out=options.out,
        pool=Pool(num_workers=options.num_workers, num_gpus=options.gpus_per_worker),
        report=ReportSettings(num_examples=options.num_examples),
        options_yaml=cli.to_yaml("measure", options),
    )
    print(f"measure: look at {options.out}/{PAGE}, then filter with jobs/curate.py --measures {options.out}")
    return 0


if __name__ == "__main__":
    cli.run("measure", Options, main)
