"""The demo world's clips and their manifest: python jobs/make_demo_world.py --out runs/demo/world."""

from dataclasses import dataclass

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make synthetic clips with several sounding events, whose kinds and times are known."""

    out: cli.StoragePath
    """Folder to make: clips/<clip id>.mp4 and the manifest clips.csv."""
    num_train: int = 2048
    """Clips that SF-CAVP and M_0 are trained on."""
    num_rpo: int = 512
    """Clips of the preference rounds."""
    num_val: int = 256
    """Clips for calibration and gates."""
    num_test: int = 256
    """Clips for the reported tables alone."""
    seed: int = 0
    """Seed of the world. A clip depends on it and on its own number alone."""
    num_workers: int = 2
    """Parallel Ray Data tasks; 0 works in this process without Ray. Changes no byte of the result."""

    def __post_init__(self) -> None:
        cli.require(self.num_workers >= 0, f"--num-workers must be 0 or more, got {self.num_workers}")
        cli.require(self.seed >= 0, f"--seed must be 0 or more, got {self.seed}")
        counts = (self.num_train, self.num_rpo, self.num_val, self.num_test)
        cli.require(min(counts) >= 0 and sum(counts) > 0, f"counts of clips {counts} must be 0 or more, not all 0")


def main(options: Options) -> int:
    """Make the world; 0 when it is there."""
    from pipelines.data.demo_world_job import CLIPS_CSV, make_demo_world

    make_demo_world(
        seed=options.seed,
        counts={
            "train": options.num_train,
            "rpo": options.num_rpo,
            "val": options.num_val,
            "test": options.num_test,
        },
        out=options.out,
        num_workers=options.num_workers,
        options_yaml=cli.to_yaml("make_demo_world", options),
    )
    print(f"manifest: {options.out}/{CLIPS_CSV}")
    return 0


if __name__ == "__main__":
    cli.run("make_demo_world", Options, main)
