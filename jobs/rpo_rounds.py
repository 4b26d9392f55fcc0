"""Preference rounds: pairs from M_k, M_{k+1} trained on them, a gate; over and over: policy + reward -> policy."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jobs import cli
from pipelines.training.options import PolicyTrainingOptions
from pipelines.training.worker_range import NumWorkers

if TYPE_CHECKING:
    from pipelines.preferences.generation import PairInputs
    from pipelines.preferences.round_stages import RoundSettings
    from pipelines.training.workers import WorkerGroup


@dataclass(frozen=True, kw_only=True)
class Options(PolicyTrainingOptions):
    """Run preference rounds from a policy; started again after a kill, the same command goes on where it was."""

    policy: cli.StoragePath
    """Checkpoint of M_0."""
    reward: cli.StoragePath
    """SF-CAVP checkpoint that ranks; frozen throughout."""
    features: cli.StoragePath
    """Features dataset: clips for pairs, and held-out clips for the gate."""
    out: cli.StoragePath
    """Folder of the launch; round k lies in round_<k>."""
    weights: cli.StoragePath | None = None
    """Folder that import_mmaudio made, with the codec's networks; None: the policy's own, where it has them."""
    rounds: int = 3
    """Number of rounds."""
    with_control: bool = False
    """Train the equal-steps control beside: same pairs, winners, order, steps and noise, no preference term."""
    dry_run: bool = False
    """Print the plan and its cost and touch nothing."""
    split: str = "rpo"
    """Split whose clips give pairs; with `train` the reward ranks clips that it was trained on."""
    mode: Literal["gt_vs_worst", "best_vs_worst", "gt_vs_random", "random_vs_random", "gt_vs_distorted", "mixed"] = (
        "gt_vs_worst"
    )
    """Winner against loser, as in generate_preferences."""
    mixture: tuple[str, ...] = ("gt_vs_worst=0.5", "best_vs_worst=0.25", "gt_vs_distorted=0.25")
    """Probabilities of the modes for --mode mixed, drawn for each pair."""
    margin: tuple[float, ...] = (0.5,)
    """Least difference of the rewards of winner and loser, in z-units of real pairs: one for all rounds, or one a
    round (4 0.5 goes from easy pairs to hard ones)."""
    num_candidates: int = 5
    """Sounds sampled a clip."""
    num_steps: int = 25
    """Euler steps of the sampler."""
    guidance: float = 4.5
    """Classifier-free guidance; 1 is the conditional field alone."""
    max_clips: int | None = None
    """Use a seeded sample of so many clips a round, another one each round; all by default."""
    max_reject_rate: float = 0.05
    """Share of clips that may be rejected."""
    kappa: float = 200.0
    """beta / 2 on mean-reduced errors; one knob together with --lr."""
    fm_weight: float = 1.0
    """Weight of the winner's flow-matching error."""
    divide_by_kappa: bool = False
    """Divide the preference loss by kappa, so that kappa shapes the loss and does not scale its gradient."""
    label_smoothing: float = 0.0
    """Probability that a pair's label is wrong."""
    loser_clip: float | None = None
    """No gradient pushes the loser's error beyond so much above the reference's (0.05 is a start)."""
    sdpo_mu: float | None = None
    """Weaken the loser's gradient so that the winner's error does not rise (Diffusion-SDPO; 0.5 to 0.9)."""
    strict_guards: bool = False
    """End a round's training at an alarm of loser-driven collapse; otherwise it is only reported."""
    probe_every: int = 25
    """Steps between measurements of the gradients of both loss parts; 0: never. Not under ZeRO-3."""
    steps: int = 860
    """Optimizer steps of a round."""
    batch_size: int = 48
    """Pairs a step, over all workers and accumulation steps."""
    lr: float = 5e-6
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly, in each round."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    eval_split: str = "val"
    """Split that the gate compares policies on."""
    eval_candidates: int = 4
    """Sounds a clip that the gate looks at; their spread is the diversity."""
    eval_clips: int | None = None
    """Clips that the gate looks at; all of the split by default."""
    eval_seed: int = 0
    """Seed of the gate's noise; apart from --seed, so that launches of other seeds are asked the same question."""
    gate: Literal["strict", "report"] = "strict"
    """strict: a refused round ends the launch with the policy before it, exit 4; report: recorded, and on it goes."""
    min_reward_gain: float = 0.0
    """Gate: the mean reward must rise by more than this."""
    max_fm_loss_rise: float = 0.03
    """Gate: the flow-matching loss on real sound may rise by less than this share."""
    max_diversity_fall: float = 0.10
    """Gate: the diversity among a clip's candidates may fall by less than this share."""
    max_f1_fall: float = 0.02
    """Gate: onset F1 and class-aware F1, where events are known, may fall by at most this."""
    max_mel_distance_rise: float = 0.10
    """Gate: the log-mel distance to the real sound may rise by less than this share."""
    max_frechet_rise: float = 0.50
    """Gate: the Frechet distance to the real sounds after the codec may rise by less than this share."""
    num_workers: NumWorkers = 2
    """Ray Train workers that train and sample; a range, as 2:8, goes on with those that are there; 0 works in this
    process without Ray."""
    gpus_per_worker: Literal[0, 1] | None = None
    """GPUs of a worker; None: one where the cluster has so many now. Give 1 on a cluster that grows from nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.require(len(self.margin) > 0, "give --margin one number, or one a round")


def main(options: Options, group: "WorkerGroup | None" = None) -> int:
    """Run the launch, in `group` if there is one; or print its plan."""
    from pipelines.preferences.generation import PairInputs
    from pipelines.preferences.round_stages import Resources, launch_rounds

    inputs = PairInputs(
        policy=options.policy,
        reward=options.reward,
        features=options.features,
        split=options.split,
        weights=options.weights,
    )
    settings = _settings(options)
    if options.dry_run:
        return _print_plan(options, inputs, settings)
    resources = Resources(
        num_workers=options.num_workers,
        gpus_per_worker=options.gpus_per_worker,
        execution=options.execution(),
        max_reject_rate=options.max_reject_rate,
    )
    manifest = launch_rounds(
        inputs,
        settings,
        resources,
        out=options.out,
        group=group,
        options_yaml=cli.to_yaml("rpo_rounds", options),
    )
    for entry in manifest["rounds"]:
        print(f"round {entry['round']}: {entry['verdict']}", *entry["reasons"], sep="\n  ")
    print(f"final policy: {manifest['final_policy']['path']}")
    return 0


def _settings(options: Options) -> "RoundSettings":
    from models.preference import PreferenceLossConfig
    from pipelines.evaluation.subjects import EvaluationSettings
    from pipelines.preferences.candidates import Sampling
    from pipelines.preferences.gate import GateLimits
    from pipelines.preferences.make_pairs import PairSettings
    from pipelines.preferences.round_stages import PreferenceTraining, RoundSettings

    sampling = Sampling(num_steps=options.num_steps, guidance=options.guidance)
    return RoundSettings(
        num_rounds=options.rounds,
        pairs=PairSettings(
            mode=options.mode,
            mixture=options.mixture,
            margin=options.margin[0],
            num_candidates=options.num_candidates,
            sampling=sampling,
            seed=options.seed,
            round_index=0,
            max_clips=options.max_clips,
        ),
        later_margins=options.margin[1:],
        training=PreferenceTraining(
            options=options.training(),
            loss=PreferenceLossConfig(
                kappa=options.kappa,
                fm_weight=options.fm_weight,
                divide_by_kappa=options.divide_by_kappa,
                label_smoothing=options.label_smoothing,
                loser_clip=options.loser_clip,
            ),
            sdpo_mu=options.sdpo_mu,
            strict_guards=options.strict_guards,
            probe_every=options.probe_every,
            lora=options.lora(),
        ),
        evaluation=EvaluationSettings(
            subject="policy",
            split=options.eval_split,
            seed=options.eval_seed,
            num_candidates=options.eval_candidates,
            sampling=sampling,
            max_clips=options.eval_clips,
        ),
        limits=GateLimits(
            min_reward_gain=options.min_reward_gain,
            max_fm_loss_rise=options.max_fm_loss_rise,
            max_diversity_fall=options.max_diversity_fall,
            max_f1_fall=options.max_f1_fall,
            max_mel_distance_rise=options.max_mel_distance_rise,
            max_frechet_rise=options.max_frechet_rise,
        ),
        gate=options.gate,
        with_control=options.with_control,
    )


def _print_plan(options: Options, inputs: "PairInputs", settings: "RoundSettings") -> int:
    from pipelines.preferences.round_stages import plan_launch

    for line in plan_launch(inputs, settings, out=options.out):
        print(line)
    return 0


if __name__ == "__main__":
    cli.run("rpo_rounds", Options, main)
