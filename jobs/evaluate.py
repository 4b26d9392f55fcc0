"""Scores of one model, or of a control, on one split: features + checkpoint + reward -> scores."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jobs import cli

if TYPE_CHECKING:
    from pipelines.training.workers import WorkerGroup


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sample every clip of a split with fixed noise and measure it: reward, onset F1, distances to the real sound."""

    reward: cli.StoragePath
    """SF-CAVP checkpoint that gives the reward."""
    features: cli.StoragePath
    """Features dataset of the clips."""
    out: cli.StoragePath
    """Folder of the scores dataset."""
    policy: cli.StoragePath | None = None
    """Checkpoint to sample from; not needed for ground_truth and inverted."""
    weights: cli.StoragePath | None = None
    """Folder that import_mmaudio made, with the codec's networks; None: the policy's own, where it has them."""
    subject: Literal["policy", "shuffled", "ground_truth", "inverted"] = "policy"
    """What is measured: the policy; the policy given another clip's conditions; the real sound; the real sound after
    the codec."""
    split: str = "test"
    """Split whose clips are scored."""
    seed: int = 0
    """Seed of the noise; the same seed asks every model the same question."""
    num_candidates: int = 1
    """Sounds a clip. The first is the one that is scored; more give diversity, rank correlation and Best-of-N."""
    num_steps: int = 25
    """Euler steps of the sampler."""
    guidance: float = 4.5
    """Classifier-free guidance; 1 is the conditional field alone."""
    max_clips: int | None = None
    """Score a seeded sample of so many clips; all by default."""
    num_workers: int = 2
    """Parallel workers; 0 works in this process without Ray."""
    gpus_per_worker: float = 0.0
    """GPUs that a worker holds; 0 works on CPUs."""
    max_reject_rate: float = 0.05
    """Share of clips that may be rejected."""
    external_generated: cli.StoragePath | None = None
    """Folder of embeddings and logits that your own evaluation networks made of these sounds, `<kind>.parquet`, `.npz`
    or `.safetensors`: MMAudio's columns are printed as well."""
    external_reference: cli.StoragePath | None = None
    """The same of the real sounds; of ImageBind, those of the pictures."""
    vggss: cli.StoragePath | None = None
    """vggss.json, or a file with one id a line: MMAudio's columns are given again without these clips."""

    def __post_init__(self) -> None:
        needs_policy = self.subject in ("policy", "shuffled")
        cli.require(
            not needs_policy or self.policy is not None,
            f"--policy is missing: --subject {self.subject} samples from one",
        )
        cli.require(
            needs_policy or self.num_candidates == 1,
            f"--subject {self.subject} is one sound a clip; leave --num-candidates at 1",
        )
        cli.require(
            self.num_candidates >= 1 and self.num_steps >= 1, "--num-candidates and --num-steps must be at least 1"
        )
        cli.require(self.max_clips is None or self.max_clips >= 1, "--max-clips must be at least 1")
        cli.require(self.num_workers >= 0 and self.gpus_per_worker >= 0, "--num-workers and --gpus-per-worker: from 0")
        cli.require(
            self.external_generated is not None or (self.external_reference is None and self.vggss is None),
            "--external-reference and --vggss need --external-generated",
        )


def main(options: Options, group: "WorkerGroup | None" = None) -> int:
    """Run the stage, in `group` if there is one, and print its table."""
    from pipelines.data.units import Pool
    from pipelines.evaluation.evaluate import EvaluationInputs, evaluate, read_scores
    from pipelines.evaluation.subjects import EvaluationSettings
    from pipelines.evaluation.summary import summarise
    from pipelines.evaluation.tables import plain_text
    from pipelines.preferences.candidates import Sampling

    settings = EvaluationSettings(
        subject=options.subject,
        split=options.split,
        seed=options.seed,
        num_candidates=options.num_candidates,
        sampling=Sampling(num_steps=options.num_steps, guidance=options.guidance),
        max_clips=options.max_clips,
    )
    inputs = EvaluationInputs(
        features=options.features, reward=options.reward, policy=options.policy, weights=options.weights
    )
    # Before the work: a file that cannot be used is told at once.
    external = _external_columns(options)
    evaluate(
        inputs,
        settings,
        out=options.out,
        pool=Pool(num_workers=options.num_workers, num_gpus=options.gpus_per_worker, group=group),
        max_reject_rate=options.max_reject_rate,
        options_yaml=cli.to_yaml("evaluate", options),
    )
    print(plain_text(summarise({options.subject: read_scores(options.out)[0]})), end="")
    print(external, end="")
    return 0


def _external_columns(options: Options) -> str:
    """MMAudio's columns as text; empty without files of embeddings and logits."""
    if options.external_generated is None:
        return ""
    from pipelines.evaluation.external import files_in, read_ids
    from pipelines.evaluation.external_columns import mmaudio_columns

    vgg_ss_ids = None if options.vggss is None else read_ids(options.vggss)
    files = files_in(options.external_generated, options.external_reference)
    return "\n" + mmaudio_columns(files, vgg_ss_ids=vgg_ss_ids).to_text()


if __name__ == "__main__":
    cli.run("evaluate", Options, main)
