"""The acceptance gates of a reward on a split: reward + features (+ scores with candidates) -> gates."""

from dataclasses import dataclass

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure whether a reward may rank sounds, before preference rounds rely on it."""

    reward: cli.StoragePath
    """SF-CAVP checkpoint to measure."""
    features: cli.StoragePath
    """Features dataset with real pairs."""
    out: cli.StoragePath
    """Folder for gates.json and gates.txt."""
    split: str = "val"
    """Split of the real pairs."""
    scores: cli.StoragePath | None = None
    """Evaluation of a policy on that split with --num-candidates of 2 or more: adds the gates on ranking."""
    truth_scores: cli.StoragePath | None = None
    """Evaluation of the real sound (--subject inverted) on that split: adds how often it beats the candidates."""

    def __post_init__(self) -> None:
        cli.require(self.truth_scores is None or self.scores is not None, "--truth-scores needs --scores")


def main(options: Options) -> int:
    """Run the stage and print its table."""
    from pipelines.data.storage import open_folder
    from pipelines.evaluation.reward_check import TABLE, CheckInputs, check_reward

    inputs = CheckInputs(
        reward=options.reward,
        features=options.features,
        scores=options.scores,
        truth_scores=options.truth_scores,
    )
    check_reward(inputs, split=options.split, out=options.out, options_yaml=cli.to_yaml("check_reward", options))
    print(open_folder(options.out).read_bytes(TABLE).decode(), end="")
    return 0


if __name__ == "__main__":
    cli.run("check_reward", Options, main)
