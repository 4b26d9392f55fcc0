"""Preference pairs: a policy's candidates for every clip of a split, ranked by the reward: -> pairs."""

from dataclasses import dataclass
from typing import Literal

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sample candidates for every clip of a split, score them with SF-CAVP, and choose a winner and a loser a clip."""

    policy: cli.StoragePath
    """Checkpoint to sample from."""
    reward: cli.StoragePath
    """SF-CAVP checkpoint that ranks."""
    features: cli.StoragePath
    """Features dataset of the clips."""
    out: cli.StoragePath
    """Folder of the pairs dataset."""
    weights: cli.StoragePath | None = None
    """Folder that import_mmaudio made, with the codec's networks; None: the policy's own, where it has them."""
    split: str = "rpo"
    """Split whose clips are used; with `train` the reward ranks clips that it was trained on."""
    mode: Literal["gt_vs_worst", "best_vs_worst", "gt_vs_random", "random_vs_random", "gt_vs_distorted", "mixed"] = (
        "gt_vs_worst"
    )
    """Winner against loser: ground truth against the lowest candidate (the paper's), highest against lowest candidate,
    ground truth or a random candidate against a random candidate, ground truth against itself made wrong in time, or a
    mixture."""
    mixture: tuple[str, ...] = ("gt_vs_worst=0.5", "best_vs_worst=0.25", "gt_vs_distorted=0.25")
    """Probabilities of the modes for --mode mixed, drawn for each pair."""
    margin: float = 0.5
    """Least difference of the rewards of winner and loser, in z-units of real pairs."""
    num_candidates: int = 5
    """Sounds sampled a clip."""
    num_steps: int = 25
    """Euler steps of the sampler."""
    guidance: float = 4.5
    """Classifier-free guidance; 1 is the conditional field alone."""
    round: int = 0
    """Number of the round: other rounds draw other noise."""
    seed: int = 0
    """Seed of noise, choices and samples."""
    max_clips: int | None = None
    """Use a seeded sample of so many clips, another one each round; all by default."""
    num_workers: int = 2
    """Parallel workers; 0 works in this process without Ray."""
    gpus_per_worker: float = 0.0
    """GPUs that a worker holds; 0 works on CPUs."""
    max_reject_rate: float = 0.05
    """Share of clips that may be rejected."""

    def __post_init__(self) -> None:
        cli.require(self.num_workers >= 0 and self.gpus_per_worker >= 0, "--num-workers and --gpus-per-worker: from 0")
        cli.require(self.round >= 0, f"--round must be 0 or more, got {self.round}")


def main(options: Options) -> int:
    """Run the stage and print what became of the clips."""
    from pipelines.data.units import Pool
    from pipelines.preferences.candidates import Sampling
    from pipelines.preferences.generation import PairInputs, generate_pairs
    from pipelines.preferences.make_pairs import PairSettings

    settings = PairSettings(
        mode=options.mode,
        mixture=options.mixture,
        margin=options.margin,
        num_candidates=options.num_candidates,
        sampling=Sampling(num_steps=options.num_steps, guidance=options.guidance),
        seed=options.seed,
        round_index=options.round,
        max_clips=options.max_clips,
    )
    manifest = generate_pairs(
        PairInputs(
            policy=options.policy,
            reward=options.reward,
            features=options.features,
            split=options.split,
            weights=options.weights,
        ),
        settings,
        out=options.out,
        pool=Pool(num_workers=options.num_workers, num_gpus=options.gpus_per_worker),
        max_reject_rate=options.max_reject_rate,
        options_yaml=cli.to_yaml("generate_preferences", options),
    )
    print(", ".join(f"{name} {count}" for name, count in manifest["outcomes"].items()))
    return 0


if __name__ == "__main__":
    cli.run("generate_preferences", Options, main)
